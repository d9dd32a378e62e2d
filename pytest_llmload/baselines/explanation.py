"""What explains the metrics that changed: modules, settings, loading work, counted work, parts of the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytest_llmload.baselines import manifest, settings
from pytest_llmload.baselines.entries import stored_names
from pytest_llmload.baselines.environment import entry
from pytest_llmload.baselines.model import Baseline, RecordedTime
from pytest_llmload.baselines.timings import LOAD
from pytest_llmload.core.environment_entries import HOST
from pytest_llmload.core.metrics import lookup
from pytest_llmload.core.results import SLACK, LoadResult
from pytest_llmload.core.units import format_change, format_movement
from pytest_llmload.core.verdicts import IMPROVED, OK, REGRESSED, UNEXPLAINED, ManifestChange, MetricVerdict

#: Share of a change in load time that a part of the load must account for to be named.
_WORTH = 0.25
#: Metrics that count the storages of weights, which may be larger than the weights.
_STORED = ("gpu.weights", "host.weights")
#: Metrics that explain why others changed; named even if they are not comparable themselves.
_REASONS = ("gpu.load_allocations", "gpu.load_allocated", "gpu.other_tensors", "host.other_tensors")


def because(
    section: str,
    verdicts: Sequence[MetricVerdict],
    baseline: Baseline,
    result: LoadResult,
    changed: Sequence[str],
    times: Mapping[str, RecordedTime],
) -> list[str]:
    """Return what explains the metrics that changed: parts of the load that take longer, modules, then counted work.

    For memory and the load time, that is the loading work and tensors outside the model; for other times, the work.
    """
    moved = [item for item in verdicts if item.verdict in (REGRESSED, IMPROVED) and not item.informative]
    if not moved:
        return []
    place = _parts(baseline, result, times[LOAD]) if any(item.name == LOAD for item in moved) else []
    return [*place, *_causes(section, verdicts, moved, baseline, result, changed)]


def _parts(baseline: Baseline, result: LoadResult, now: RecordedTime) -> list[str]:
    """Return the parts of the load whose times changed with it, the largest changes first.

    There are none if the baseline does not have parts.
    """
    recorded = baseline.time[entry(result.environment, HOST)][LOAD]
    both = recorded.parts.keys() & now.parts.keys()
    change = now.median - recorded.median
    moves = {name: now.parts[name] - recorded.parts[name] for name in both}
    return [
        f"{name} {format_movement(recorded.parts[name], now.parts[name], 's')}"
        for name in sorted(both, key=lambda name: -abs(moves[name]))
        if change and moves[name] / change >= _WORTH
    ]


def _causes(
    section: str,
    verdicts: Sequence[MetricVerdict],
    moved: Sequence[MetricVerdict],
    baseline: Baseline,
    result: LoadResult,
    changed: Sequence[str],
) -> list[str]:
    known = baseline.manifest and result.manifest
    reasons = [difference.text for difference in manifest.diff(baseline.manifest, result.manifest)] if known else []
    reasons += [difference.text for difference in settings_changed(baseline, result)]
    if section == "work":
        return reasons
    if section == "time" and any(item.name != LOAD for item in moved):
        return [*reasons, *_work(baseline, result, changed)]
    # A cause is named next to its effect; a cause alone has its own line already.
    causes = _REASONS if any(item.name not in _REASONS for item in moved) else ()
    for name in causes:
        old, new = baseline.memory.get(name), result.metrics.get(name)
        if old is not None and new is not None and old != new:
            reasons.append(f"{name} {format_change(new - old, lookup(name).unit)}")
    reasons += _no_longer_mapped(moved, baseline, result)
    if any(item.name in _STORED and item.verdict == REGRESSED for item in moved):
        reasons += [note for note in result.notes if note.startswith(SLACK)]
    if any(item.name.endswith(".growth") and item.verdict == REGRESSED for item in moved):
        reasons.append("each call of the model leaves memory behind: a list, a cache or a hook keeps tensors")
    settled = {item.name: item.verdict for item in verdicts}.get("gpu.settled")
    worse = [lookup(item.name, result.table) for item in moved if item.verdict == REGRESSED]
    if settled == OK and any(metric.kind == "loading_work" for metric in worse):
        reasons.append("the load makes copies that it frees again: gpu.settled is as recorded")
    # Different values in the same shapes take the same memory.
    if known and causes and not reasons and all(line.startswith(("weights ", "revision ")) for line in changed):
        reasons.append(UNEXPLAINED)
    return reasons


def _no_longer_mapped(moved: Sequence[MetricVerdict], baseline: Baseline, result: LoadResult) -> list[str]:
    """Return a line if the host holds as its own memory what it mapped from files when the baseline was recorded."""
    grown = max(
        (
            item.current - item.baseline
            for item in moved
            if item.name in ("host.settled", "host.peak") and item.current is not None and item.baseline is not None
        ),
        default=0.0,
    )
    old, new = baseline.memory.get("host.file"), result.metrics.get("host.file")
    if old is None or new is None or grown <= 0 or old - new < grown / 2:
        return []
    return [f"host.file {format_change(new - old, 'B')}: what was mapped from files is now read into memory"]


def _work(baseline: Baseline, result: LoadResult, changed: Sequence[str]) -> list[str]:
    """Return the counted work that changed; noise does not change it, so it is named even if it is not comparable."""
    reasons = []
    for name in stored_names({**baseline.work, **result.metrics}, "work", result.table):
        old, new = baseline.work.get(name), result.metrics.get(name)
        declared = lookup(name, result.table)
        if old is not None and new is not None and not declared.tolerance.allows(old, new):
            figures = format_movement(old, new, declared.unit)
            reasons.append(f"{name} {figures} ({format_change(new - old, declared.unit)})")
    if not reasons and baseline.work and not changed:
        reasons.append("no counted work explains it: operators, kernels and library versions are the same")
    return reasons


def settings_changed(baseline: Baseline, result: LoadResult) -> tuple[ManifestChange, ...]:
    """Return the model's settings that differ from the baseline's."""
    return settings.diff(baseline.settings, result.settings, baseline.environment, result.environment)
