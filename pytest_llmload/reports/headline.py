"""Summarise a run's outcome in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pytest_llmload.core.runs import Run
from pytest_llmload.reports import figures


def headline(runs: Sequence[Run]) -> str:
    """Return how many loads failed, and with which verdicts."""
    failed = figures.failed(runs)
    if not runs:
        return "Model loading: nothing was loaded"
    if not failed:
        return f"Model loading: {_loads(len(runs))}, none failed"
    words = ", ".join(
        f"{count} {verdict.replace('_', ' ')}" for verdict, count in Counter(run.fate for run in failed).items()
    )
    return f"Model loading: {len(failed)} of {_loads(len(runs))} failed ({words})"


def _loads(count: int) -> str:
    return f"{count} load" if count == 1 else f"{count} loads"
