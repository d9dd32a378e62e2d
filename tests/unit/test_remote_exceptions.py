"""Exceptions of a load's process, raised again where the test is."""

from __future__ import annotations

import base64
import pickle
import queue
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llmload.core.errors import RemoteError
from pytest_llmload.host.loads.calls import decode, encode
from pytest_llmload.process.calls import arguments
from pytest_llmload.process.session import Session, _fingerprint, describe
from pytest_llmload.system.process_exit import how


class Two(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(one)


def raised_again(error: Exception) -> Exception:
    with pytest.raises(Exception) as caught:
        decode({**describe(error, "run"), "arguments": arguments(error)})
    return caught.value


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), KeyError(), MemoryError(), ValueError("a", 1), UnicodeEncodeError("ascii", "", 0, 1, "")],
)
def test_an_exception_has_its_arguments(error: Exception) -> None:
    again = raised_again(error)
    assert (type(again), again.args) == (type(error), error.args)
    assert isinstance(again.__cause__, RemoteError)


def test_an_error_of_the_system_has_its_number_and_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "file").read_text()
    again = raised_again(caught.value)
    assert isinstance(again, FileNotFoundError)
    assert (again.errno, again.filename) == (2, str(tmp_path / "file"))


@pytest.mark.parametrize(
    "error", [ValueError(queue), ValueError("y" * 100_000), Two(1, 2)], ids=["no plain data", "too much", "other class"]
)
def test_what_cannot_travel_is_told_by_its_message(error: Exception) -> None:
    again = raised_again(error)
    assert isinstance(again, RemoteError if isinstance(error, Two) else ValueError)
    assert str(error)[:100] in str(again)


def test_what_no_encoding_can_write_is_escaped() -> None:
    assert raised_again(ValueError("bad \udce4 \x1b", b"\x1b")).args == ("bad \\udce4 \\x1b", b"\x1b")


def test_an_exception_without_a_message_is_named_once() -> None:
    assert str(describe(MemoryError(), "load")["error"]["message"]) == ""
    assert str(RemoteError("", "MemoryError")) == "MemoryError"


class Mute(RuntimeError):
    def __str__(self) -> str:
        raise ZeroDivisionError

    def __reduce__(self) -> Any:
        raise ZeroDivisionError


def test_an_exception_that_cannot_be_printed_is_told_all_the_same() -> None:
    try:
        raise Mute
    except Mute as error:
        described, given = describe(error, "run"), arguments(error)
    assert "its message cannot be shown, since its __str__ raises ZeroDivisionError" in described["error"]["message"]
    assert "raise Mute" in described["error"]["traceback"]
    assert given == ""


class Demanding(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def test_why_an_exception_is_not_of_its_own_class_is_said() -> None:
    again = raised_again(Demanding(1, 2))
    assert type(again) is RemoteError
    text = str(again)
    assert "Demanding: 1 and 2; it cannot be made again here: TypeError: " in text
    assert "'second'" in text


@pytest.mark.parametrize("outcome", [pytest.skip, pytest.fail, pytest.xfail])
def test_pytests_own_outcomes_are_outcomes(outcome: Any) -> None:
    with pytest.raises(outcome.Exception, match="not here") as there:
        outcome("not here")
    with pytest.raises(outcome.Exception, match="not here") as here:
        decode(describe(there.value, "run"))
    assert type(here.value) is outcome.Exception


def test_a_function_does_not_end_the_run() -> None:
    again = raised_again(pytest.exit.Exception("enough"))
    assert isinstance(again, RemoteError)
    assert "enough" in str(again)


def broken(model: Any, tokenizer: Any) -> None:
    model.named_parameters = None


def silent(model: Any, tokenizer: Any) -> None:
    raise Mute


@pytest.mark.parametrize(("function", "changed"), [(broken, True), (silent, False), (type, True)])
def test_what_a_function_breaks_is_not_handed_on(function: Any, changed: bool) -> None:
    torch = pytest.importorskip("torch")
    session = Session(SimpleNamespace(send=lambda message: None))  # type: ignore[arg-type]
    device = SimpleNamespace(kind="cpu")
    model = torch.nn.Linear(2, 2)
    session.loaded = SimpleNamespace(model=model, outermost=model, tokenizer=None, job=SimpleNamespace(device=device))
    session._fingerprint = _fingerprint(session.loaded)
    if function is type:
        # One whose class is broken, which concerns the look that comes before the next call too.
        session.loaded.model.__dict__["_modules"] = 5
        function = silent
    reply = session.do_run(encode(function, (), {}))
    assert reply["changed"] is changed


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (-9, "was killed by SIGKILL"),
        (-34, "was killed by SIGRTMIN"),
        (-40, "was killed by signal 40 (SIGRTMIN+6)"),
        (-33, "was killed by signal 33 (SIGRTMIN-1)"),
        (-64, "was killed by SIGRTMAX"),
        (3, "exited with status 3"),
        (None, "ended"),
    ],
)
def test_every_signal_has_a_name(status: int | None, text: str) -> None:
    assert how(status) == text


def test_code_keeps_the_name_of_its_file() -> None:
    """cloudpickle 3.1 writes "<dynamic-code>" in its place; nested code has the name too."""

    def outer() -> Any:
        return lambda: 0

    message = encode(outer, (), {})
    code = pickle.loads(base64.b64decode(message["payload"]))[0].__code__
    inner = next(const for const in code.co_consts if hasattr(const, "co_filename"))
    assert (code.co_filename, inner.co_filename) == (__file__, __file__)


def test_a_traceback_begins_in_the_functions_file() -> None:
    session = Session(SimpleNamespace(send=lambda message: None))  # type: ignore[arg-type]
    session.loaded = SimpleNamespace(
        model=None, outermost=None, tokenizer=None, job=SimpleNamespace(device=SimpleNamespace(kind="cpu"))
    )
    text = session.do_run(encode(silent, (), {}))["error"]["traceback"]
    assert next(line for line in text.splitlines() if line.startswith("  File ")).startswith(
        f'  File "{__file__}", line'
    )


class Written(Exception):
    """As safetensors raises it."""


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(28, "No space left on device"), "machine"),
        (OSError(122, "Disk quota exceeded"), "machine"),
        (Written("I/O error: No space left on device (os error 28)"), "machine"),
        (OSError(2, "No such file or directory"), "failed"),
        (ValueError("no space left on the line"), "failed"),
    ],
)
def test_a_full_disk_is_the_machines_fault(error: Exception, outcome: str) -> None:
    assert describe(error, "load")["outcome"] == outcome
    outer = RuntimeError("cannot save")
    outer.__cause__ = error
    assert describe(outer, "load")["outcome"] == outcome
