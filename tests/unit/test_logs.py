"""The end of what a process printed, as failures quote it."""

from __future__ import annotations

from pytest_llmload.core.logs import last_lines
from pytest_llmload.worker.ranks.failures import tail


def test_the_last_lines_that_say_anything(tmp_path):
    log = tmp_path / "log"
    assert last_lines(log, 3) == ""
    log.write_bytes(b"one\n\ntwo\r\n  three  \n10%\r50%\r100%\nhf_0123456789abcdefgh \xff\n\n")
    assert last_lines(log, 9) == "one\ntwo\n  three\n100%\n*** \ufffd"
    assert last_lines(log, 2) == "100%\n*** \ufffd"
    assert last_lines(log, 9, start=4) == "two\n  three\n100%\n*** \ufffd"


def test_a_rank_is_named_before_each_line(tmp_path):
    log = tmp_path / "log"
    assert tail(1, log) == "rank 1 printed nothing"
    log.write_text("loading: 10%\rloading: 20%\nhf_0123456789abcdefgh is wrong\n")
    assert tail(1, log) == "rank 1: loading: 20%\nrank 1: *** is wrong"
