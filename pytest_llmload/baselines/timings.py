"""Collect the times of several processes as a baseline keeps them, and judge whether they have changed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from pytest_llmload.baselines.environment import differing, entry
from pytest_llmload.baselines.model import Baseline, RecordedTime, significant
from pytest_llmload.baselines.statistics import Judgement, judge
from pytest_llmload.core.environment_entries import HOST
from pytest_llmload.core.metrics import Metric, lookup
from pytest_llmload.core.results import LOAD_PARTS, LoadResult
from pytest_llmload.core.verdicts import IMPROVED, INCONCLUSIVE, OK, REGRESSED

#: Number of samples that are kept of a process: its deciles, with the smallest and the largest.
_QUANTILES = 11
_DIGITS = 5
#: Significant digits of the seconds of a part, which are found by sampling.
_PART_DIGITS = 3
#: Numbers of processes after which times are judged, until all verdicts are settled; the last is recorded.
LOOKS = (5, 7, 10, 14, 20)
#: Numbers of loads after which the load time is judged at the same looks: a process has only one load time. Further
#: loads are those of processes that only load.
LOADS = (5, 10, 20, 40, 80)
LOAD = "load"
#: Time metric -> the sample name of its control.
_CONTROLS = {LOAD: "load.control", "ttft": "control", "per_token": "control"}


def conditions(metric: Metric) -> tuple[str, ...]:
    """Return what a time depends on besides the host, under which it is stored."""
    return tuple(name for name in metric.depends if name != HOST)


def timings(results: Sequence[LoadResult]) -> dict[str, RecordedTime]:
    """Return every time metric of loads of one spec, as a baseline keeps it; each result stands for one process.

    Processes that ran under different conditions from the last one (the first may have found a cold page cache) are
    ignored.
    """
    found = {}
    for name, metric in (results[-1].table if results else {}).items():
        having = [result for result in results if _samples(result, name)]
        if metric.section != "time" or not having:
            continue
        last = having[-1]
        names = (HOST, *conditions(metric))
        alike = [result for result in having if not differing(result.environment, last.environment, names)]
        control = _CONTROLS.get(name, "")
        relative = [samples for result in alike if (samples := result.samples.get(f"{name}.relative"))]
        complete = bool(control) and len(relative) == len(alike)
        found[name] = RecordedTime(
            significant(statistics.median(statistics.median(_samples(result, name)) for result in alike)),
            tuple(_quantiles(_samples(result, name)) for result in alike),
            {condition: entry(last.environment, condition) for condition in conditions(metric)},
            tuple(map(_quantiles, relative)) if complete else (),
            tuple(_median(result.samples[control]) for result in alike) if complete else (),
            _parts(alike) if name == LOAD else {},
        )
    return found


def _parts(results: Sequence[LoadResult]) -> dict[str, float]:
    """Return the median seconds of each part of the load, without parts that most processes lack."""
    having = {name: [result.phases[name] for result in results if name in result.phases] for name in LOAD_PARTS}
    return {
        name: significant(statistics.median(seconds), _PART_DIGITS)
        for name, seconds in having.items()
        if 2 * len(seconds) > len(results)
    }


def _samples(result: LoadResult, name: str) -> list[float]:
    """Return the samples of a metric; a metric that was measured once is its only sample."""
    return result.samples.get(name) or [result.metrics[name] for _ in range(name in result.metrics)]


def _median(samples: Sequence[float]) -> float:
    return significant(statistics.median(samples), _DIGITS)


def _quantiles(samples: Sequence[float]) -> tuple[float, ...]:
    """Return at most eleven values, sorted: :func:`judge` reads quantiles only."""
    ordered = sorted(samples)
    count = min(len(ordered), _QUANTILES)
    places = [round(index * (len(ordered) - 1) / max(count - 1, 1)) for index in range(count)]
    return tuple(significant(ordered[place], _DIGITS) for place in places)


def moved(baseline: RecordedTime, current: RecordedTime, tolerance: float) -> tuple[Judgement, str]:
    """Judge whether a time has changed by ``tolerance`` (a share), and describe in words what the verdict is based on.

    Both the ratios to the control that alternated with the model and the times themselves are judged. The ratios
    decide: if only the times changed, the host did. But a control does not represent all of a host, so changed ratios
    are believed only if the times do not contradict them; and if the ratios scatter too much for a verdict, unchanged
    times are enough. Without a control, the times alone decide.
    """
    absolute = judge(baseline.samples, current.samples, tolerance=tolerance)
    if not (baseline.relative and current.relative):
        return absolute, _words(absolute)
    relative = judge(baseline.relative, current.relative, tolerance=tolerance)
    if relative.verdict == INCONCLUSIVE and absolute.verdict == OK:
        return absolute, _words(absolute)
    words = _words(relative, "of the control's, ")
    if relative.verdict == absolute.verdict or INCONCLUSIVE in (relative.verdict, absolute.verdict):
        return relative, words
    if relative.verdict != OK:
        relative = dataclasses.replace(relative, verdict=INCONCLUSIVE)
    return relative, f"{words}; the time itself is {_words(absolute)}"


def undecided(before: Mapping[str, str], now: Mapping[str, str]) -> set[str]:
    """Return the times that need further processes, by the verdicts at the last look and at this one.

    Each look is one more chance of a false alarm, so a change is reported only if two consecutive looks agree.
    """
    return {
        name
        for name, verdict in now.items()
        if verdict == INCONCLUSIVE or (verdict in (REGRESSED, IMPROVED) and before.get(name) != verdict)
    }


def _words(judgement: Judgement, of: str = "") -> str:
    low, high = judgement.interval
    if not math.isfinite(high):
        return "too few processes to tell"
    return f"{of}{judgement.ratio:.3g} times the baseline's ({low:.3g} to {high:.3g})"


def recorded_time(baseline: Baseline, result: LoadResult, name: str) -> RecordedTime | None:
    """Return the baseline's time on this kind of host, or None."""
    return baseline.time.get(entry(result.environment, HOST), {}).get(name)


def why_incomparable(baseline: Baseline, result: LoadResult, name: str, now: RecordedTime) -> str:
    """Return why a time is not compared with the baseline's: a different kind of host, or different conditions.

    Empty if it is, and if the baseline has no such time at all.
    """
    recorded = recorded_time(baseline, result, name)
    if recorded is not None:
        return differing(recorded.conditions, now.conditions, conditions(lookup(name, result.table)))
    hosts = hosts_of(baseline, name)
    return f"recorded on {', '.join(hosts)}; this host is {entry(result.environment, HOST)}" if hosts else ""


def hosts_of(baseline: Baseline, name: str) -> list[str]:
    """Return the kinds of host for which the baseline has a time."""
    return sorted(host for host, times in baseline.time.items() if name in times)
