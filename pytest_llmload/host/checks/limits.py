"""``memory_ceiling`` and ``latency_budget``: limits of single tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

from pytest_llmload.baselines.compare import other_identity
from pytest_llmload.baselines.timings import moved, recorded_time, timings, why_incomparable
from pytest_llmload.core.units import format_bytes
from pytest_llmload.core.verdicts import IMPROVED, INCONCLUSIVE, OK, REGRESSED
from pytest_llmload.host.loads.timing_rounds import until_clear
from pytest_llmload.host.markers.limits import Budget, LatencyBudgetMarker, MemoryCeilingMarker
from pytest_llmload.host.markers.nearest import limit_marks
from pytest_llmload.host.markers.table import LIMIT_MARKERS
from pytest_llmload.reports import failure

if TYPE_CHECKING:
    from pytest_llmload.baselines.model import Baseline, RecordedTime
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.runs import Subject
    from pytest_llmload.host.loads.load import Load
    from pytest_llmload.host.run.state import State


def validate(item: pytest.Item) -> None:
    """Raise UsageError if a limit of the item is wrong; called at collection."""
    for name, marker in LIMIT_MARKERS.items():
        for mark in limit_marks(item, name):
            marker.read(mark, item.nodeid)


def claims(mark: pytest.Mark) -> bool:
    """Return whether a limit on a test without a load is meant for this plugin: the name may be another's label."""
    try:
        LIMIT_MARKERS[mark.name].read(mark, mark.name)
    except pytest.UsageError:
        return False
    return True


def over_ceilings(item: pytest.Item, result: LoadResult, subject: Subject) -> tuple[list[str], list[str]]:
    """Return sentences for each value over its ceiling, and for ceilings on values that this run did not measure."""
    over, unmeasured = [], []
    for mark in limit_marks(item, MemoryCeilingMarker.name):
        sizes, phases = MemoryCeilingMarker.read(mark, item.nodeid)
        for side, limit in sizes.items():
            seen = {
                (where, phase): peak
                for phase in phases
                for where, peak in result.phase_peaks.get(phase, {}).items()
                if where == side or where.startswith(f"{side}.")
            }
            if not seen:
                unmeasured.append(f"memory_ceiling({side}={format_bytes(limit)}): no {side} memory in this run")
            for where in dict.fromkeys(where for where, _ in seen):
                phase, peak = max(
                    ((phase, peak) for (place, phase), peak in seen.items() if place == where), key=lambda row: row[1]
                )
                if peak > limit:
                    over.append(failure.ceiling_text(subject, where, peak, limit, phase=phase))
    return over, unmeasured


def over_budgets(item: pytest.Item, load: Load, state: State) -> tuple[list[str], list[str]]:
    """Return sentences for medians over a budget, and for budgets that this run could not measure or compare.

    Raises LoadError if a load that is timed again does not load any more.
    """
    over, unmeasured = [], []
    now = timings(load.timed_results)
    suspects: dict[str, tuple[Budget, RecordedTime]] = {}
    for mark in limit_marks(item, LatencyBudgetMarker.name):
        for name, budget in LatencyBudgetMarker.read(mark, item.nodeid).items():
            if name not in now:
                unmeasured.append(f"latency_budget({name}={budget.text}): {name} was not measured")
            elif budget.seconds is not None:
                if now[name].median > budget.seconds:
                    over.append(_over(state, load, name, now[name], budget.seconds))
            else:
                baseline = state.store.read(state.baseline_path(load.spec))
                recorded, why = _recorded(baseline, load.result, name, now[name])
                if recorded is None:
                    unmeasured.append(f"latency_budget({name}={budget.text}): {why}")
                elif now[name].median > recorded.median * (1 + budget.relative):
                    suspects[name] = budget, recorded
    if suspects:
        found, undecided = _over_recorded(state, load, suspects)
        over += found
        unmeasured += undecided
    return over, unmeasured


def _over_recorded(
    state: State, load: Load, suspects: Mapping[str, tuple[Budget, RecordedTime]]
) -> tuple[list[str], list[str]]:
    """Return sentences for times that exceed the recorded ones by more than their budget, and for undecided ones.

    The times of one process are only a suspicion: the load is timed in further ones, as for the baselines of times.
    """
    judgements: dict[str, tuple[str, str]] = {}
    seen: dict[str, RecordedTime] = {}

    def judge(times: Mapping[str, RecordedTime] | None) -> dict[str, str]:
        for name, (budget, recorded) in suspects.items():
            if times is None or name not in times:
                judgements[name] = INCONCLUSIVE, "too few processes to tell"
                continue
            judgement, words = moved(recorded, times[name], budget.relative)
            # A time that got faster is within the budget.
            judgements[name] = (OK if judgement.verdict == IMPROVED else judgement.verdict), words
            seen[name] = times[name]
        return {name: verdict for name, (verdict, _) in judgements.items()}

    until_clear(load, state.settings.latency_time, judge)
    over, undecided = [], []
    for name, (verdict, words) in judgements.items():
        budget, recorded = suspects[name]
        limit = recorded.median * (1 + budget.relative)
        if name in seen and seen[name].median <= limit:
            continue
        if verdict == REGRESSED:
            over.append(_over(state, load, name, seen[name], limit, recorded.median))
        elif verdict == INCONCLUSIVE:
            undecided.append(f"latency_budget({name}={budget.text}): undecided, {words}")
    return over, undecided


def _over(state: State, load: Load, name: str, now: RecordedTime, limit: float, recorded: float | None = None) -> str:
    return failure.budget_text(
        state.subject(load.spec),
        name,
        now.median,
        limit,
        samples=len(load.timed_results[-1].samples.get(name, ())) or 1,
        processes=len(now.samples),
        recorded=recorded,
    )


def _recorded(
    baseline: Baseline | None, result: LoadResult, name: str, now: RecordedTime
) -> tuple[RecordedTime | None, str]:
    """Return the recorded time; or None, and why there is no time that the budget can be relative to."""
    if baseline is None:
        return None, "nothing is recorded for this load"
    if why := other_identity(baseline, result) or why_incomparable(baseline, result, name, now):
        return None, why
    recorded = recorded_time(baseline, result, name)
    return recorded, "" if recorded is not None else f"the baseline does not have {name}"
