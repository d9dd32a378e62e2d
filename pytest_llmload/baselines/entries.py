"""The names under which a load's figures are kept in a baseline, and the choice among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from pytest_llmload.baselines.model import Baseline, RecordedTime, has_numbers
from pytest_llmload.core.metrics import MANIFEST, NUMBERS, Metric, find, section_of
from pytest_llmload.core.results import LoadResult

_GPU = re.compile(r"gpu\.(\d+)\.")


def sum_of(name: str) -> str:
    """Return the metric over all GPUs to which one GPU's figure belongs: ``gpu.settled`` for ``gpu.0.settled``."""
    return _GPU.sub("gpu.", name)


def selection(metrics: Sequence[str] | None, section: str, table: Mapping[str, Metric]) -> Callable[[str], bool]:
    """Return a predicate that tells whether a name is among ``metrics``; None selects all.

    A sum over GPUs also stands for each GPU's figure. Raises KeyError for an unknown metric, and ValueError for one of
    a different section.
    """
    if metrics is None:
        return lambda name: True
    for name in metrics:
        if (own := section_of(name, table)) != section:
            raise ValueError(f"{name!r} is a figure of the {own} baseline, not of the {section} baseline")
    return lambda name: name in metrics or sum_of(name) in metrics


def names_of(baseline: Baseline, result: LoadResult, section: str) -> list[str]:
    """Return the metrics on either side, in the order of their table."""
    order = {name: place for place, name in enumerate(result.table)}
    names = {*baseline.figures(section), *stored_names(result.metrics, section, result.table)}
    return sorted(names, key=lambda name: (order.get(sum_of(name), len(order)), name))


def stored_names(metrics: Mapping[str, float], section: str, table: Mapping[str, Metric]) -> list[str]:
    """Return the measured metrics of a section; for a single GPU the sum alone, since the GPU's figure equals it."""
    gpus = {match[1] for name in metrics if (match := _GPU.match(name))}
    declared = ((name, find(name, table)) for name in metrics if len(gpus) > 1 or not _GPU.match(name))
    return [name for name, metric in declared if metric is not None and metric.section == section]


def measured(result: LoadResult, section: str, times: Mapping[str, RecordedTime]) -> list[str]:
    """Return the names of all entries that a load has for a section; ``times`` are its times."""
    if section == "time":
        return list(times)
    names = stored_names(result.metrics, section, result.table)
    if section == "memory":
        names += [MANIFEST] if result.manifest else []
        names += [NUMBERS] if has_numbers(result.numbers) else []
    return names
