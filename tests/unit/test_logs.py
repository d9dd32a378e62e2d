"""What a load's process prints and says reaches people and reports bounded, without secrets, and printable."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from sample_loads import load

from pytest_llmload.core.results import FAILED, ErrorInfo
from pytest_llmload.host.loads.processes import LoadProcess
from pytest_llmload.host.loads.warm_server import WarmServer
from pytest_llmload.process.ranks.failures import tail
from pytest_llmload.process.session import describe
from pytest_llmload.system.logs import last_lines
from pytest_llmload.system.protocol import Channel, Message

TOKEN = "hf_thisIsNobodysToken123"


def answered(reply: Message) -> Message:
    """What the pytest process sees of a load's reply."""
    ours, theirs = socket.socketpair()
    with theirs, ThreadPoolExecutor(1) as sender:
        sender.submit(Channel(theirs).send, reply)
        process = LoadProcess(Channel(ours), 0, Path("log"), cast(WarmServer, None), owned=False)
        return process.request({"kind": "load"}, 10.0)


def raised(error: ValueError) -> Message:
    try:
        raise error
    except ValueError as caught:
        return describe(caught, "load")


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        ("one\n\ntwo\r\n 10%\r 90%\r\nthree", "two\n 90%\nthree"),
        (f"\x1b[31mred\x1b[0m\x1b \0 {TOKEN}\n", "red\\x1b \\x00 ***"),
        ("", ""),
    ],
)
def test_the_end_of_a_log(printed: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(printed.encode())
    assert last_lines(tmp_path / "log", 3) == told
    assert last_lines(tmp_path / "none", 3) == ""


def test_of_a_deep_stack_the_innermost_calls_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stack = ["Fatal Python error: Aborted", "", "Stack (most recent call first):"]
    stack += [f'  File "x.py", line {number} in f{number}' for number in range(50)]
    log.write_text("\n".join(["early", "about to abort", *stack]))
    assert last_lines(log, 6).splitlines() == ["about to abort", stack[0], *stack[2:6]]
    log.write_text("\n".join([*stack, "one", "two"]))
    assert last_lines(log, 2) == "one\ntwo"


def test_of_a_long_log_only_the_end_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("z" * 10_000_000)
    (line,) = last_lines(log, 3).splitlines()
    assert re.fullmatch(r"…z{499}… \(\d+ more characters\)", line)
    log.write_text("z" * 10_000_000 + f"\nlast {'y' * 700}")
    assert last_lines(log, 1) == f"last {'y' * 495}… (205 more characters)"
    assert last_lines(log, 3, start=log.stat().st_size - 3) == "yyy"


def test_what_was_raised_is_printable_and_bounded() -> None:
    error = answered(raised(ValueError(f"bad \udce4 \x1b[0m {TOKEN}")))["error"]
    assert error["message"] == "bad \\udce4 \\x1b[0m ***"
    assert TOKEN not in error["traceback"]
    error["traceback"].encode()
    error = answered(raised(ValueError("y" * 1_000_000)))["error"]
    assert error["message"].endswith("y… (995904 more characters)")
    assert len(json.dumps(error)) < 20_000
    assert "in raised" in error["traceback"]


def test_what_was_seen_is_printable_too_and_otherwise_as_it_was() -> None:
    seen = load(outcome=FAILED, notes=["a\0b"], error=ErrorInfo("m\udce4"), environment={"torch": "\x07"})
    told = answered({"kind": "result", "result": seen.to_json()})["result"]
    assert told["notes"] == ["a\\x00b"]
    assert told["error"]["message"] == "m\\udce4"
    assert told["environment"] == {"torch": "\\x07"}
    same = [field.name for field in dataclasses.fields(seen) if field.name not in ("notes", "error", "environment")]
    before: dict[str, Any] = json.loads(json.dumps(seen.to_json()))
    assert {name: told[name] for name in same} == {name: before[name] for name in same}


def test_values_arrive_untouched() -> None:
    value = {"kind": "value", "tokens": [1], "text": "\0\x1b\udce4" + "x" * 10_000}
    assert answered(value) == value


def test_a_rank_is_named_before_each_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(1, log) == "rank 1 printed nothing"
    log.write_text(f"loading: 10%\rloading: 20%\n{TOKEN} is wrong\n")
    assert tail(1, log) == "rank 1: loading: 20%\nrank 1: *** is wrong"
