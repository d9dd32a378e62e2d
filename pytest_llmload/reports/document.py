"""The report document: a run's figures and verdicts as plain data. ``docs/report-schema.md`` describes it.

Every format of ``--llm-report`` is made from this document, so that all formats agree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.portable import portable_spec, scrubber
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import Tolerance
from pytest_llmload.core.verdicts import Comparison, MetricVerdict

#: Version of the document; the commands that read reports refuse a newer one.
SCHEMA = 1


def document(runs: Sequence[Run], *, stale: Sequence[str] = (), notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the report of a run's loads as plain data, without secrets and without numbers that JSON cannot hold.

    Args:
        runs: The loads, in the order in which tests first used them.
        stale: Baseline files that no test of this run used, relative to the root directory.
        notes: Facts about the run as a whole, one sentence each.
    """
    report = {
        "schema": SCHEMA,
        "runs": [_run(run) for run in runs],
        "stale": list(stale),
        "notes": list(notes),
    }
    cleaned: dict[str, Any] = _clean(report)
    return cleaned


def _run(run: Run) -> dict[str, Any]:
    result = run.result or LoadResult(spec={}, outcome="")
    return {
        "id": run.spec.id,
        "model": run.spec.name,
        "variant": run.spec.slug,
        "spec": {**portable_spec(run.spec.to_json()), "model": run.spec.model},
        "device": run.device_key,
        "outcome": run.outcome,
        "verdict": run.verdict,
        "verdicts": {comparison.section: _comparison(comparison) for comparison in run.comparisons},
        "messages": run.messages,
        "failures": run.failures,
        "over_limits": run.over_limits,
        "tests": run.nodeids,
        "locations": run.locations,
        "command": run.command,
        "suite": run.suite,
        "times": run.times,
        "page_cache": result.environment.get("page_cache", ""),
        "baseline": run.baseline,
        "accepted": run.accepted,
        "recorded": run.recorded,
        "load": result.outcome,
        "error": dataclasses.asdict(result.error) if result.error else None,
        "problems": [dataclasses.asdict(problem) for problem in result.problems],
        "faults": [dataclasses.asdict(fault) for fault in result.faults],
        "metrics": result.metrics,
        "declared": {metric.name: _declared(metric) for metric in result.declared},
        "unavailable": result.unavailable,
        "samples": result.samples,
        "phase_peaks": result.phase_peaks,
        "timeline": result.timeline,
        "phases": result.phases,
        "phase_samples": result.phase_samples,
        "ledger": result.ledger,
        "numbers": dataclasses.asdict(result.numbers),
        "manifest": [dataclasses.asdict(row) for row in result.manifest],
        "settings": result.settings,
        "environment": result.environment,
        "digests": result.digests,
        "whole_bytes": result.whole_bytes,
        "notes": result.notes,
        "allocations": [dataclasses.asdict(each) for each in result.allocations],
    }


def _declared(metric: Metric) -> dict[str, Any]:
    return {**dataclasses.asdict(metric), "tolerance": _tolerance(metric.tolerance)}


def _tolerance(tolerance: Tolerance) -> dict[str, float]:
    return {"relative": tolerance.relative, "absolute": tolerance.absolute}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "verdict": comparison.verdict,
        "whole": comparison.whole,
        "reason": comparison.reason,
        "metrics": {item.name: _metric(item) for item in comparison.metrics},
        "manifest": [dataclasses.asdict(change) for change in comparison.manifest],
        "because": list(comparison.because),
        "changed": list(comparison.changed),
    }


def _metric(item: MetricVerdict) -> dict[str, Any]:
    return {
        "verdict": item.verdict,
        "baseline": item.baseline,
        "current": item.current,
        "unit": item.unit,
        "tolerance": _tolerance(item.tolerance),
        "reason": item.reason,
        "informative": item.informative,
    }


def _clean(value: Any) -> Any:
    """Return a value without secrets, whose texts encode as UTF-8, and with None for NaN and infinity.

    Strict JSON readers refuse NaN and infinity.
    """
    return _cleaned(value, scrubber())


def _cleaned(value: Any, scrub: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {scrub(key): _cleaned(item, scrub) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item, scrub) for item in value]
    return value
