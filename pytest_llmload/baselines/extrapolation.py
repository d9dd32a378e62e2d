"""Extrapolate the measurements of cuts of a model to a number of layers that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from pytest_llmload.baselines.model import Baseline
from pytest_llmload.core.metrics import find

#: Classes of memory metrics that grow with the bytes of the weights: to the byte, or about.
_EXACT, _ABOUT = ("exact",), ("allocator", "host", "loading_work")


@dataclass(frozen=True)
class Extrapolated:
    """One metric at a number of layers that was not measured."""

    metric: str
    value: float
    #: True if the value is exact to the byte; else it is only the value on the line through the measured cuts.
    exact: bool


def extrapolate(cuts: Mapping[int, Baseline], planned: Mapping[int, int], layers: int) -> list[Extrapolated]:
    """Return the memory metrics that every cut has, on the line through the smallest and the largest cut.

    ``cuts`` are at least two baselines of one way of loading, by their number of layers; ``planned`` are the bytes that
    the weights take at each number of layers by plan, which says what layers of each kind add. A metric is exact only
    if the other cuts lie on the line too, and either a planned byte is a measured byte or all layers are alike.
    """
    first, last = min(cuts), max(cuts)
    steps = {Fraction(planned[each] - planned[first], each - first) for each in (*cuts, layers) if each != first}
    names = set.intersection(*(set(baseline.memory) for baseline in cuts.values()))
    found = []
    for name in sorted(names):
        metric = find(name)
        if metric is None or metric.unit != "B" or metric.kind not in (*_EXACT, *_ABOUT):
            continue
        values = {count: Fraction(baseline.memory[name]) for count, baseline in cuts.items()}
        slope = (values[last] - values[first]) / (planned[last] - planned[first])
        on_line = all(
            value == values[first] + slope * (planned[count] - planned[first]) for count, value in values.items()
        )
        value = values[last] + slope * (planned[layers] - planned[last])
        is_exact = on_line and (slope in (0, 1) or len(steps) == 1)
        found.append(Extrapolated(name, float(value), metric.kind in _EXACT and is_exact))
    return found
