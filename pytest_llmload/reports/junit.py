"""Write a load as JUnit properties: ``llmload.<metric>``, ``llmload.verdict``, ``llmload.spec``."""

from __future__ import annotations

import math

from pytest_llmload.core.runs import Run

PREFIX = "llmload."


def properties(run: Run) -> list[tuple[str, str | int | float]]:
    """Return plain pairs, which survive the way from an xdist worker and into XML."""
    pairs: list[tuple[str, str | int | float]] = [
        (f"{PREFIX}spec", run.spec.id),
        (f"{PREFIX}device", run.device_key),
        (f"{PREFIX}verdict", run.verdict),
    ]
    for name, value in sorted((run.result.metrics if run.result else {}).items()):
        if math.isfinite(value):
            pairs.append((f"{PREFIX}{name}", int(value) if value == int(value) else float(value)))
    return pairs
