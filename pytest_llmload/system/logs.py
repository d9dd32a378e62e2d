"""Read the end of what a process printed, however much that is."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pytest_llmload.core.portable import bounded, scrubber

#: Bytes at the end of a log that are read, and characters of a line that are kept.
_WINDOW = 64 << 10
LINE = 500
#: Escape sequences that set a terminal's colours.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
#: How faulthandler begins, and how each further line of it does (CPython, Python/traceback.c).
_FATAL = "Fatal Python error:"
_STACK = (
    "  File ",
    "  ...",
    "  <",
    "Stack (",
    "Thread ",
    "Current thread ",
    "Extension modules:",
    "Python runtime state:",
)


def last_lines(log: Path, count: int, start: int = 0) -> str:
    """Return the last lines of a log, or of its part from byte ``start``; empty if there is no log.

    The text is printable and without blank lines, colours and secrets. A progress bar, which rewrites its line, shows
    its last state. Of a stack that Python wrote when a signal ended it, the first lines are kept, which are the
    innermost calls (faulthandler: most recent call first).
    """
    if not log.exists():
        return ""
    with log.open("rb") as file:
        begin = max(start, file.seek(0, os.SEEK_END) - _WINDOW)
        file.seek(begin)
        text = COLOURS.sub("", file.read(_WINDOW).decode(errors="replace"))
    if begin > start:
        text = f"…{text}"
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    lines = [line for line in lines if line]
    begin = len(lines)
    while begin and lines[begin - 1].startswith(_STACK):
        begin -= 1
    first = len(lines) - count
    if begin and lines[begin - 1].startswith(_FATAL):
        first = min(first, begin - 1 - count // 6)
    first = max(0, first)
    scrub = scrubber()
    return "\n".join(bounded(scrub(line), LINE) for line in lines[first : first + count])
