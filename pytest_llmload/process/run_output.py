"""Keep the output, logs and warnings of a test's function in the load's process for pytest to show as the test's."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.system.protocol import Message

#: Log records, and warnings at different places, of one call that are sent to pytest.
_MOST = 1000
#: Warnings that Python ignores by default and pytest's own filters may ask for.
_IGNORED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
_FORMATTER = logging.Formatter()
#: The attributes of a log record that are sent unchanged.
_FIELDS = (
    "name", "levelno", "levelname", "pathname", "filename", "module", "lineno", "funcName", "created", "msecs",
    "process", "processName", "thread", "threadName",
)  # fmt: skip


@contextlib.contextmanager
def kept(request: Message) -> Iterator[Message]:
    """Write printed output to the files that a request names; yield the log records and warnings, as they come.

    A request without files comes from ``--llm-isolation=inline``: pytest sees everything itself.
    """
    found: Message = {"records": [], "warnings": []}
    if "output" not in request:
        yield found
        return
    with _printed_to(request["output"]), _logged(request["levels"], found["records"]), _warned(found["warnings"]):
        yield found


@contextlib.contextmanager
def _printed_to(paths: list[str]) -> Iterator[None]:
    """Redirect stdout and stderr to two files, also for native code and for processes that are started."""
    _flush()
    own = [os.dup(1), os.dup(2)]
    for number, path in enumerate(paths, 1):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, number)
        os.close(target)
    try:
        yield
    finally:
        _flush()
        for number, saved in enumerate(own, 1):
            os.dup2(saved, number)
            os.close(saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # The function may have closed it, which has written what it held.
        with contextlib.suppress(ValueError):
            stream.flush()
    # Flush the buffers of C, as of a library's printf.
    ctypes.CDLL(None).fflush(None)


class _Records(logging.Handler):
    """A handler that turns log records into plain data, as many as are sent."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        super().__init__()
        self._found = found
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._found) >= _MOST:
            self._left_out += 1
            return
        try:
            self._found.append(_plain(record))
        except Exception:  # noqa: BLE001 - a record's arguments are the user's, and logging says what is wrong with them
            self.handleError(record)

    def close(self) -> None:
        if self._left_out:
            text = f"{self._left_out} further log records of this call are left out"
            last = logging.LogRecord(__name__.partition(".")[0], logging.WARNING, __file__, 0, text, None, None)
            self._found.append(_plain(last))
        super().close()


def _plain(record: logging.LogRecord) -> dict[str, Any]:
    found = {name: getattr(record, name) for name in _FIELDS}
    trace = _FORMATTER.formatException(record.exc_info) if record.exc_info else None
    return {**found, "msg": record.getMessage(), "exc_text": record.exc_text or trace}


@contextlib.contextmanager
def _logged(levels: dict[str, int], found: list[dict[str, Any]]) -> Iterator[None]:
    """Collect the records that reach the root logger, with the levels that loggers have in the pytest process."""
    loggers = {logging.getLogger(name or None): level for name, level in levels.items()}
    own = {logger: logger.level for logger in loggers}
    handler = _Records(found)
    for logger, level in loggers.items():
        logger.setLevel(level)
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
        handler.close()
        for logger, level in own.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _warned(found: list[dict[str, Any]]) -> Iterator[None]:
    """Collect warnings, each once from each place; pytest's filters decide about them."""
    seen: set[tuple[str, type[Warning], str, int]] = set()
    # Thousands of modules are looked through for each file.
    module_of = functools.cache(_module_of)

    def note(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        key = (str(message), category, filename, lineno)
        if key not in seen and len(seen) < _MOST:
            seen.add(key)
            kinds = [kind for kind in category.__mro__ if issubclass(kind, Warning)]
            names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
            place = {"filename": filename, "lineno": lineno, "module": module_of(filename)}
            found.append({"message": key[0], "categories": names, **place})

    with warnings.catch_warnings():
        for kind in _IGNORED:
            warnings.simplefilter("always", kind)
        warnings.showwarning = note
        yield


def _module_of(filename: str) -> str:
    """Return the module name of a file, for the filters of warnings; a test's module is not imported here."""
    modules = list(sys.modules.items())
    found = (name for name, module in modules if getattr(module, "__file__", None) == filename)
    return next(found, Path(filename).stem)
