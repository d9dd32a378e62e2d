"""Collect what libraries log during a load: transformers' LOAD REPORT is a log record, not a Python warning."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pytest_llmload.quantisation.registry import methods
from pytest_llmload.system.logs import COLOURS

_LOGGERS = ("transformers", "accelerate", "peft")
#: A row of transformers' LOAD REPORT.
_MISMATCH = re.compile(
    r"^(\S+) *\| *MISMATCH *\|.* ckpt: torch\.Size\((.*?)\) vs model: *torch\.Size\((.*?)\)", re.MULTILINE
)


class _Collector(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {COLOURS.sub('', record.getMessage()).strip()}")


def mismatches(lines: Iterable[str]) -> list[str]:
    """Return a sentence for each tensor in collected records whose shapes in checkpoint and model differ."""
    rows = (row for line in lines for row in _MISMATCH.findall(line))
    return [f"{name} is {stored} in the checkpoint and {own} in the model" for name, stored, own in rows]


@contextmanager
def warnings_of_libraries() -> Iterator[list[str]]:
    """Collect log records at WARNING or above and Python warnings; both still reach their usual destinations.

    A library whose own level hides warnings is set to WARNING while the context is open.
    """
    lines: list[str] = []
    collector = _Collector(lines)
    levels = {}
    for name in (*_LOGGERS, *(name for method in methods() for name in method.loggers)):
        logger = logging.getLogger(name)
        levels[name] = logger.level
        if logger.getEffectiveLevel() > logging.WARNING:
            logger.setLevel(logging.WARNING)
        logger.addHandler(collector)
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield lines
        for warning in caught:
            lines.append(f"{warning.category.__name__}: {warning.message}")
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    finally:
        for name, level in levels.items():
            logger = logging.getLogger(name)
            logger.removeHandler(collector)
            logger.setLevel(level)
