"""What a call in the load's process says is bounded, and is said again in pytest's."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path

import pytest

from pytest_llmload.host.loads import run_output as host
from pytest_llmload.process import run_output as process

MOST = 1000


def request(folder: Path, **levels: int) -> dict[str, object]:
    return {"output": [str(folder / "out"), str(folder / "err")], "levels": levels}


def test_what_a_call_says_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with process.kept(request(tmp_path)) as found:
        for number in range(MOST + 5):
            logging.getLogger("chatty").error("line %d", number)
            exec(f"\n{number} * '\\n'; warnings.warn('{number}')", {"warnings": warnings})
    assert len(found["records"]) == MOST + 1
    assert found["records"][-1]["msg"] == "5 further log records of this call are left out"
    assert len(found["warnings"]) == MOST
    monkeypatch.setattr(host, "_WINDOW", 10)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with host.shown((tmp_path / "out", tmp_path / "err")):
        (tmp_path / "out").write_text("0123456789abcdef\n")
    assert stream.getvalue() == "… 7 bytes before this are left out\n789abcdef\n"


def test_levels_are_those_of_pytest_for_the_call_only(tmp_path: Path) -> None:
    logger = logging.getLogger("app.part")
    with process.kept(request(tmp_path, **{"app.part": logging.DEBUG})) as found:
        logger.debug("wanted")
    logger.debug("not wanted")
    assert [record["msg"] for record in found["records"]] == ["wanted"]
    assert logger.level == logging.NOTSET


def test_inline_sees_everything_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with process.kept({}) as found:
        print("here")
    assert capsys.readouterr().out == "here\n"
    assert found == {"records": [], "warnings": []}


def test_a_class_that_pytest_does_not_know_is_named() -> None:
    told = {"message": "slow", "filename": __file__, "lineno": 3, "module": "there"}
    names = ["far.away.SlowWarning", "builtins.RuntimeWarning", "builtins.Warning"]
    with pytest.warns(RuntimeWarning, match=r"far\.away\.SlowWarning: slow"):
        host.warn({"warnings": [{**told, "categories": names}]})
