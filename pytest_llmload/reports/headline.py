"""Summarise a run's outcome in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import counted
from pytest_llmload.reports import figures


def headline(runs: Sequence[Run]) -> str:
    """Return how many loads failed, and with which verdicts."""
    failed = figures.failed(runs)
    if not runs:
        return "Model loading: nothing was loaded"
    if not failed:
        return f"Model loading: {counted(len(runs), 'load')}, none failed"
    words = ", ".join(
        f"{count} {verdict.replace('_', ' ')}" for verdict, count in Counter(run.fate for run in failed).items()
    )
    return f"Model loading: {len(failed)} of {counted(len(runs), 'load')} failed ({words})"
