"""Exceptions of a load's process, raised again where the test is."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from pytest_llmload.core.errors import RemoteError
from pytest_llmload.host.loads.calls import decode
from pytest_llmload.process.calls import arguments
from pytest_llmload.process.session import describe


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
