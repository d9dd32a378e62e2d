"""Compare a load with its baseline: pure functions from data to data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pytest_llmload.baselines import manifest, numbers
from pytest_llmload.baselines.entries import measured, names_of, selection, sum_of
from pytest_llmload.baselines.environment import changes, differing
from pytest_llmload.baselines.explanation import because, settings_changed
from pytest_llmload.baselines.model import Baseline, RecordedTime, has_numbers
from pytest_llmload.baselines.timings import hosts_of, moved, recorded_time, timings, why_incomparable
from pytest_llmload.core.canonical import canonical_json
from pytest_llmload.core.metrics import MANIFEST, NUMBERS, Metric, find, lookup
from pytest_llmload.core.portable import portable_spec
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.core.units import Tolerance, counted, plural
from pytest_llmload.core.verdicts import (
    CHANGED,
    IMPROVED,
    INCOMPARABLE,
    MISSING,
    OK,
    REGRESSED,
    UNAVAILABLE,
    Comparison,
    ManifestChange,
    MetricVerdict,
    worst,
)

_DEFAULTS = {item.name: item.default for item in dataclasses.fields(LoadSpec) if item.name != "workload"}


def compare(
    baseline: Baseline | None,
    result: LoadResult,
    *,
    metrics: Sequence[str] | None = None,
    tolerances: Mapping[str, Tolerance] | None = None,
    section: str = "memory",
    times: Mapping[str, RecordedTime] | None = None,
) -> Comparison:
    """Compare a load that worked with its baseline, for one section: ``memory``, ``work`` or ``time``.

    ``metrics`` limits the comparison to some metrics (``manifest`` and ``numbers`` are names too). ``tolerances``
    replaces the declared ones; ``gpu.settled`` also stands for each GPU's figure. ``times`` are those of several
    processes; without them, the load's own times are judged, which are of one process. Raises KeyError for an unknown
    metric, and ValueError for a load that failed or a metric of a different section.
    """
    if not result.ok:
        raise ValueError(f"a load that ended in {result.outcome!r} has no figures to compare")
    chosen = selection(metrics, section, result.table)
    allowed = _Tolerances(tolerances or {}, result.table)
    now = timings([result]) if times is None else times
    is_measured = any(map(chosen, measured(result, section, now)))
    if baseline is None:
        if not is_measured:
            return Comparison(section, UNAVAILABLE, reason=f"this load measured nothing for {section}")
        return Comparison(section, MISSING, whole=True, reason="nothing is recorded for this load")
    changed = _context(baseline, result)
    if reason := other_identity(baseline, result):
        differences = manifest.diff(baseline.manifest, result.manifest) if baseline.manifest else ()
        return Comparison(section, INCOMPARABLE, whole=True, reason=reason, manifest=differences, changed=changed)
    differences = ()
    if section == "time":
        recorded = bool(baseline.time)
        names = [name for name, metric in result.table.items() if metric.section == "time" and chosen(name)]
        found = (_time(name, baseline, result, now.get(name), allowed) for name in names)
        verdicts = [item for item in found if item is not None]
    else:
        recorded = bool(baseline.figures(section))
        names = [name for name in names_of(baseline, result, section) if chosen(name)]
        # Report every metric that is requested by name, even if neither side has a value.
        answered = {*names, *map(sum_of, names)}
        names += [name for name in metrics or () if find(name, result.table) and name not in answered]
        verdicts = [_metric(name, baseline, result, section, allowed) for name in names]
    if section == "memory":
        recorded = recorded or bool(baseline.manifest) or has_numbers(baseline.numbers)
        if chosen(MANIFEST) and (baseline.manifest or result.manifest or metrics):
            item, differences = _manifest(baseline, result)
            verdicts.append(item)
        if chosen(NUMBERS) and (has_numbers(baseline.numbers) or has_numbers(result.numbers)):
            verdicts.append(_numbers(baseline, result, allowed))
    if not recorded and is_measured:
        return Comparison(section, MISSING, whole=True, reason=f"nothing is recorded for {section}", changed=changed)
    if not verdicts:
        return Comparison(section, UNAVAILABLE, reason=f"this load measured nothing for {section}", changed=changed)
    return Comparison(
        section,
        worst(item.verdict for item in verdicts if not item.informative),
        metrics=tuple(verdicts),
        manifest=differences,
        because=tuple(because(section, verdicts, baseline, result, changed, now)),
        changed=changed,
    )


class _Tolerances:
    """Tolerances by metric: those given for this comparison take precedence over the declared ones."""

    def __init__(self, given: Mapping[str, Tolerance], table: Mapping[str, Metric]) -> None:
        for name in given:
            if name != NUMBERS:
                lookup(name, table)
        self._given = given

    def of(self, name: str, declared: Tolerance) -> Tolerance:
        return self._given.get(name) or self._given.get(sum_of(name)) or declared


# --- identity and environment ----------------------------------------------------------------------------------------


def other_identity(baseline: Baseline, result: LoadResult) -> str:
    """Return why the baseline belongs to a different load; empty if it belongs to this one."""
    shape = result.digests.get("shape", "")
    if shape != baseline.shape:
        return f"different model shape: {_sides(baseline.shape[:12], shape[:12] or 'none')}"
    spec = LoadSpec.from_json(result.spec)
    now = portable_spec(spec.identity())
    if now != baseline.spec:
        fields = sorted(name for name in {**baseline.spec, **now} if baseline.spec.get(name) != now.get(name))
        parts = (f"{name} is {_sides(_value(baseline.spec, name), _value(now, name))}" for name in fields)
        return f"different spec: {'; '.join(parts)}"
    if str(spec.workload) != baseline.workload:
        return f"different workload: {_sides(baseline.workload, str(spec.workload))}"
    return ""


def _sides(recorded: str, now: str) -> str:
    return f"{recorded} in the baseline and {now} now"


def _value(identity: Mapping[str, object], name: str) -> str:
    """Return a field of an identity, or its default, since identities omit fields at their defaults."""
    return canonical_json(identity[name] if name in identity else _DEFAULTS.get(name))


def _context(baseline: Baseline, result: LoadResult) -> tuple[str, ...]:
    lines = changes(baseline.environment, result.environment) if baseline.environment else ()
    weights = result.digests.get("weights", "")
    if weights != baseline.weights:
        lines = (*lines, f"weights {baseline.weights[:12]} -> {weights[:12]}")
    return lines


# --- metrics ---------------------------------------------------------------------------------------------------------


def _metric(name: str, baseline: Baseline, result: LoadResult, section: str, allowed: _Tolerances) -> MetricVerdict:
    old, new = baseline.figures(section).get(name), result.metrics.get(name)
    declared = find(name, result.table)
    if declared is None:
        return MetricVerdict(name, UNAVAILABLE, old, reason="no probe of this run declares the metric")
    tolerance = allowed.of(name, declared.tolerance)
    verdict, reason = _judge(name, declared, old, new, tolerance, baseline, result)
    # A file without the figure is compared without it.
    informative = declared.informative or (declared.late and old is None)
    return MetricVerdict(name, verdict, old, new, declared.unit, tolerance, reason, informative)


def _judge(
    name: str,
    declared: Metric,
    old: float | None,
    new: float | None,
    tolerance: Tolerance,
    baseline: Baseline,
    result: LoadResult,
) -> tuple[str, str]:
    if new is None:
        why = result.unavailable
        return UNAVAILABLE, why.get(name) or why.get(declared.name) or "not measured by this load"
    # Checked before "missing": a figure of a different environment would not fit the file's.
    if reason := differing(baseline.environment, result.environment, declared.depends):
        return INCOMPARABLE, reason
    if old is None:
        return MISSING, "missing in the baseline"
    if tolerance.allows(old, new):
        return OK, ""
    return (REGRESSED if (new < old) == declared.more_is_better else IMPROVED), ""


def _time(
    name: str, baseline: Baseline, result: LoadResult, now: RecordedTime | None, allowed: _Tolerances
) -> MetricVerdict | None:
    declared = lookup(name, result.table)
    tolerance = allowed.of(name, declared.tolerance)
    recorded = recorded_time(baseline, result, name)
    if now is None:
        if not hosts_of(baseline, name):
            return None
        verdict, reason = UNAVAILABLE, result.unavailable.get(name, "not measured by this load")
    elif reason := why_incomparable(baseline, result, name, now):
        verdict = INCOMPARABLE
    elif recorded is None:
        verdict, reason = MISSING, "missing in the baseline"
    else:
        judgement, reason = moved(recorded, now, tolerance.room(recorded.median) / recorded.median)
        verdict = judgement.verdict
    old, new = recorded.median if recorded else None, now.median if now else None
    return MetricVerdict(name, verdict, old, new, declared.unit, tolerance, reason, declared.informative)


# --- modules and numbers ---------------------------------------------------------------------------------------------


def _manifest(baseline: Baseline, result: LoadResult) -> tuple[MetricVerdict, tuple[ManifestChange, ...]]:
    if not result.manifest:
        reason = result.unavailable.get(MANIFEST, "not measured by this load")
        return MetricVerdict(MANIFEST, UNAVAILABLE, reason=reason), ()
    if not baseline.manifest:
        return MetricVerdict(MANIFEST, MISSING, reason="missing in the baseline"), ()
    differences = manifest.diff(baseline.manifest, result.manifest)
    fields = settings_changed(baseline, result)
    if not differences and not fields:
        return MetricVerdict(MANIFEST, OK), ()
    modules = sum(difference.modules for difference in differences)
    counts = [counted(modules, "module")] if modules else []
    counts += [counted(len(fields), "setting")] if fields else []
    verb = plural(modules + len(fields), "differs", "differ")
    verdict = MetricVerdict(MANIFEST, CHANGED, reason=f"{' and '.join(counts)} {verb}")
    return verdict, (*differences, *fields)


def _numbers(baseline: Baseline, result: LoadResult, allowed: _Tolerances) -> MetricVerdict:
    own = numbers.tolerance(result.manifest)
    tolerance = allowed.of(NUMBERS, Tolerance(relative=own))
    limit = max(tolerance.relative, tolerance.absolute)

    def verdict(word: str, reason: str, error: float | None = None) -> MetricVerdict:
        return MetricVerdict(NUMBERS, word, None, error, "1", tolerance, reason)

    if not has_numbers(result.numbers):
        return verdict(UNAVAILABLE, result.unavailable.get(NUMBERS, "not measured by this load"))
    if not has_numbers(baseline.numbers):
        return verdict(MISSING, "missing in the baseline")
    weights = result.digests.get("weights", "")
    if weights != baseline.weights:
        return verdict(INCOMPARABLE, f"different weights: {baseline.weights[:12]} -> {weights[:12]}")
    if reason := differing(baseline.environment, result.environment, numbers.DEPENDS):
        return verdict(INCOMPARABLE, reason)
    difference = numbers.difference(baseline.numbers, result.numbers, limit)
    if difference.incomparable:
        return verdict(INCOMPARABLE, difference.incomparable)
    # Kernels of a different release may round differently where they quantise.
    alike = not differing(baseline.environment, result.environment, numbers.BYTES_DEPEND)
    contents = numbers.other_contents(baseline.numbers, result.numbers) if alike else ""
    reason = "; ".join(filter(None, (difference.reason, contents)))
    return verdict(CHANGED if reason else OK, reason, difference.error)
