"""List a load's figures as names and texts, for reports of other tools."""

from __future__ import annotations

from pytest_llmload.core.metrics import find
from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import format_value


def rows(run: Run) -> list[tuple[str, str]]:
    """Return the load, its device, its verdict, and every figure with its unit, as pairs of name and text."""
    found = [("load", run.spec.id), ("device", run.device_key), ("verdict", run.verdict.replace("_", " "))]
    if run.result is None:
        return found
    for name, value in sorted(run.result.metrics.items()):
        metric = find(name, run.result.table)
        found.append((name, format_value(value, metric.unit if metric else "1")))
    return found
