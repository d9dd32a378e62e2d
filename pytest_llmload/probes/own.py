"""The user's probes of a load, and the rule that every figure is declared by the probe that writes it."""

from __future__ import annotations

from typing import TypeVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import MANIFEST, NUMBERS, Metric, find
from pytest_llmload.core.references import resolve
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.base import Probe

_Figure = TypeVar("_Figure")


def own_probes(job: Job) -> list[type[Probe]]:
    """Return the probes that hooks registered for a load, in the order they run."""
    return [resolve(reference) for reference in job.probes]


def declared_by(probes: list[type[Probe]]) -> tuple[Metric, ...]:
    """Return the metrics that probes declare, each once."""
    return tuple(dict.fromkeys(metric for probe in probes for metric in probe.metrics))


def fill(probe: Probe, result: LoadResult) -> None:
    """Let a probe write its figures. Raises ValueError if it writes one that it does not declare, which is dropped."""
    metrics, unavailable = dict(result.metrics), dict(result.unavailable)
    probe.fill(result)
    written = [name for name, value in result.metrics.items() if name not in metrics or metrics[name] is not value]
    written += [name for name, why in result.unavailable.items() if unavailable.get(name) is not why]
    table = {metric.name: metric for metric in probe.metrics}
    undeclared = [name for name in written if name not in (MANIFEST, NUMBERS) and find(name, table) is None]
    if undeclared:
        for name in undeclared:
            _restore(result.metrics, metrics, name)
            _restore(result.unavailable, unavailable, name)
        kind, first = type(probe), undeclared[0]
        raise ValueError(
            f"probe {kind.__module__}.{kind.__qualname__} wrote the figure {first!r}, and its 'metrics' declare "
            f"{', '.join(table) or 'nothing'}; add a Metric({first!r}, unit, kind) to them, or correct the name"
        )


def _restore(figures: dict[str, _Figure], before: dict[str, _Figure], name: str) -> None:
    figures.pop(name, None)
    if name in before:
        figures[name] = before[name]
