"""Distinguish exceptions of checks and probes from those of the model, and describe them."""

from __future__ import annotations

import traceback

from pytest_llmload.core.code_paths import short_path
from pytest_llmload.core.results import Fault

#: Packages whose frames are skipped when the code that caused an exception is searched.
_PASSED_THROUGH = ("torch/",)
_OWN = "pytest_llmload/"


def fault(who: str, error: Exception) -> Fault:
    """Return the record of a check or probe that raised; ``who`` is ``check 'values'`` or ``probe 'Manifest'``."""
    text = " ".join(str(error).split())[:500]
    what = ": ".join(part for part in (type(error).__name__, text) if part)
    message = f"{who} raised {what} ({innermost(error)}); this says nothing about the model"
    return Fault(who, message, "".join(traceback.format_exception(error)))


def is_own(error: Exception) -> bool:
    """Return true if this package's code raised: the innermost frame outside torch is in it."""
    return innermost(error).startswith(_OWN)


def innermost(error: Exception) -> str:
    """Return the innermost line outside torch in a traceback, like ``bitsandbytes/functional.py:1696``."""
    frames = [
        (file, line) for file, line, _, _ in traceback.extract_tb(error.__traceback__) if not file.startswith("<")
    ]
    places = [(short_path(file), line) for file, line in frames]
    file, line = next((place for place in reversed(places) if not place[0].startswith(_PASSED_THROUGH)), places[-1])
    return f"{file}:{line}"
