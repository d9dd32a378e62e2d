"""What a process printed last."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.portable import scrub


def last_lines(log: Path, count: int, start: int = 0) -> str:
    """The last lines of a log, or of its part from byte ``start``, that say anything; empty where there is no log.

    A progress bar, which rewrites its line, is there by its last state; tokens that a library printed are hidden.
    """
    if not log.exists():
        return ""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    return scrub("\n".join([line for line in lines if line][-count:]))
