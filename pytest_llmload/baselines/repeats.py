"""Check that the repeats of one load agree, and merge them into one load that represents them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from pytest_llmload.baselines import manifest, numbers
from pytest_llmload.core.metrics import find
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.units import format_value


def agree(results: Sequence[LoadResult]) -> tuple[LoadResult, list[str]]:
    """Return one load that represents all its repeats, and the reasons why it may not be stored.

    Figures that must repeat exactly are refused if they differ; of other figures, the larger is taken. Raises
    ValueError for loads that did not work or are not of one spec.
    """
    if not results or not all(result.ok for result in results):
        raise ValueError("only loads that worked can be recorded")
    last = results[-1]
    if any(result.spec != last.spec for result in results):
        raise ValueError("only repeats of one spec can be recorded together")
    metrics = {}
    unavailable = dict(last.unavailable)
    refusals = [*_other_models(results), *_other_numbers(results)]
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        values = [result.metrics[name] for result in results if name in result.metrics]
        declared = find(name, last.table)
        if not all(map(math.isfinite, values)):
            refusals.append(f"{name} is not a finite number")
        elif declared and declared.exact and len({*values}) > 1:
            figures = ", ".join(f"{format_value(value, declared.unit)} ({value:,.0f})" for value in values)
            refusals.append(f"{name} must repeat exactly but differs between {len(values)} loads: {figures}")
        elif len(values) < len(results):
            unavailable[name] = f"measured by {len(values)} of {len(results)} loads"
        else:
            metrics[name] = max(values)
    # A setting that differs between loads says nothing about the model.
    repeated = {name: text for name, text in last.settings.items() if _everywhere(name, text, results)}
    # One load of them may have been repeated to record who allocates.
    sites = next((result.allocations for result in results if result.allocations), [])
    load = dataclasses.replace(
        last, metrics=metrics, unavailable=unavailable, settings=repeated, allocations=list(sites)
    )
    return load, refusals


def _everywhere(name: str, text: str, results: Sequence[LoadResult]) -> bool:
    return all(result.settings.get(name) == text for result in results)


def _other_models(results: Sequence[LoadResult]) -> Iterable[str]:
    last = results[-1]
    for kind in ("shape", "weights"):
        if len({result.digests[kind] for result in results}) > 1:
            yield f"the digest of the model's {kind} differs between {len(results)} loads"
    for other in results[:-1]:
        for difference in manifest.diff(other.manifest, last.manifest):
            yield f"modules differ between two loads: {difference.text}"


def _other_numbers(results: Sequence[LoadResult]) -> Iterable[str]:
    last = results[-1]
    allowed = numbers.tolerance(last.manifest)
    # The first load is also compared with itself: a single load's numbers may not be finite.
    for other in results:
        difference = numbers.difference(other.numbers, last.numbers, allowed)
        if reason := difference.reason or difference.incomparable:
            yield f"numbers cannot be recorded: {reason}"
