"""Show the output, logs and warnings of a test's function in the load's process as if it had run in pytest's."""

from __future__ import annotations

import builtins
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.core.portable import scrub
from pytest_llmload.system.protocol import Message

#: Bytes at the end of a stream that are shown.
_WINDOW = 1 << 20


def levels() -> dict[str, int]:
    """Return the level of each logger that has one, including those that the test or an option of pytest has set."""
    known = logging.root.manager.loggerDict
    own = {name: logger.level for name, logger in list(known.items()) if isinstance(logger, logging.Logger)}
    return {"": logging.root.level, **{name: level for name, level in own.items() if level}}


@contextlib.contextmanager
def shown(files: tuple[Path, Path] | None) -> Iterator[None]:
    """Write a call's output to pytest's streams, however the call ended; ``files`` are those of its request."""
    for path in files or ():
        path.unlink(missing_ok=True)
    try:
        yield
    finally:
        for path, stream in zip(files or (), (sys.stdout, sys.stderr), strict=False):
            stream.write(_printed(path))


def _printed(path: Path) -> str:
    """Return the end of a file's output: printable, without secrets, with only the last state of a progress bar."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        left_out = max(file.seek(0, os.SEEK_END) - _WINDOW, 0)
        file.seek(left_out)
        text = file.read(_WINDOW).decode(errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    head = f"… {left_out} bytes before this are left out\n" if left_out else ""
    return head + scrub("\n".join(lines))


def log(reply: Message) -> None:
    """Hand log records to the loggers of the same names, and so to ``caplog`` and to the report of a failure."""
    for fields in reply.get("records", ()):
        logger = logging.getLogger(fields["name"])
        if logger.isEnabledFor(fields["levelno"]):
            texts = {name: scrub(fields[name]) for name in ("msg", "exc_text") if fields[name]}
            logger.handle(logging.makeLogRecord({**fields, **texts, "args": ()}))


def warn(reply: Message) -> None:
    """Issue warnings at the places they came from, for pytest's filters. Raise one that a filter makes an error."""
    __tracebackhide__ = True
    for fields in reply.get("warnings", ()):
        place = (fields["filename"], fields["lineno"], fields["module"])
        warnings.warn_explicit(_warning(fields["categories"], scrub(fields["message"])), None, *place)


def _warning(names: list[str], text: str) -> Warning:
    """Return a warning of the first class that pytest's process knows; its text names a first class that is unknown."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        kind: Any = getattr(builtins if module == "builtins" else sys.modules.get(module), attribute, None)
        if isinstance(kind, type) and issubclass(kind, Warning):
            # A user's class may require different arguments; its base does not.
            with contextlib.suppress(TypeError):
                return kind(text if name == names[0] else f"{names[0]}: {text}")
    return UserWarning(f"{names[0]}: {text}")
