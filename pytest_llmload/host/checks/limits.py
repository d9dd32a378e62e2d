"""``memory_ceiling`` and ``latency_budget``: limits of single tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pytest_llmload.baselines.compare import other_identity
from pytest_llmload.baselines.timings import moved, recorded_timing, timings
from pytest_llmload.core.units import format_bytes, parse_bytes, parse_seconds
from pytest_llmload.core.verdicts import IMPROVED, INCONCLUSIVE, OK, REGRESSED
from pytest_llmload.host.loads.timing_rounds import until_clear
from pytest_llmload.host.markers.nearest import limit_marks
from pytest_llmload.reports import failure

if TYPE_CHECKING:
    from pytest_llmload.baselines.model import Baseline, Timing
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.verdicts import Subject
    from pytest_llmload.host.loads.load import Load
    from pytest_llmload.host.run.state import State

PHASES = ("load", "forward", "generate")
TIMES = ("load", "ttft", "per_token")


def ceiling_of(mark: pytest.Mark, where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Bytes for ``gpu`` and ``host``, and the phases they hold in. Raises UsageError."""
    kwargs = dict(mark.kwargs)
    phase = kwargs.pop("phase", None)
    if mark.args or not kwargs or set(kwargs) - {"gpu", "host"}:
        raise pytest.UsageError(f"{where}: memory_ceiling: write memory_ceiling(gpu='9GiB'), host=, or both")
    if phase is not None and phase not in PHASES:
        raise pytest.UsageError(f"{where}: memory_ceiling: unknown phase {phase!r}: one of {', '.join(PHASES)}")
    try:
        sizes = {side: parse_bytes(size) for side, size in kwargs.items()}
    except ValueError as error:
        raise pytest.UsageError(f"{where}: memory_ceiling: {error}") from None
    return sizes, (phase,) if phase else PHASES


@dataclass(frozen=True)
class Budget:
    """A limit of one time."""

    #: As it was written.
    text: str
    #: Seconds; None where the limit is relative.
    seconds: float | None = None
    #: Part of the baseline's median that may come on top of it.
    relative: float = 0.0

    @classmethod
    def parse(cls, text: object) -> Budget:
        """``"150ms"``, or ``"+10%"`` of the baseline's median. ValueError says what to write."""
        if isinstance(text, str) and (match := re.fullmatch(r"\s*\+\s*(\d+(?:\.\d+)?)\s*%\s*", text)):
            if not float(match[1]):
                raise ValueError(f"{text!r}: no two times are equal, the budget has to be more than 0 %")
            return cls(text, relative=float(match[1]) / 100)
        return cls(str(text), parse_seconds(text))


def budget_of(mark: pytest.Mark, where: str) -> dict[str, Budget]:
    """The limits of ``load``, ``ttft`` and ``per_token``. Raises UsageError."""
    if mark.args or not mark.kwargs or set(mark.kwargs) - set(TIMES):
        raise pytest.UsageError(f"{where}: latency_budget: write latency_budget(load='30s'), ttft=, per_token=")
    try:
        return {name: Budget.parse(text) for name, text in mark.kwargs.items()}
    except ValueError as error:
        raise pytest.UsageError(f"{where}: latency_budget: {error}") from None


def memory_of(mark: pytest.Mark, where: str) -> int:
    """Bytes that each GPU must have. Raises UsageError."""
    try:
        (size,) = [*mark.args, *mark.kwargs.values()]
        return parse_bytes(size)
    except ValueError:
        raise pytest.UsageError(f"{where}: gpu_memory: write one size, as in gpu_memory('40GiB')") from None


def validate(item: pytest.Item) -> None:
    """Raise UsageError if a limit of the item is wrong; called at collection."""
    for name, read in _READERS.items():
        for mark in limit_marks(item, name):
            read(mark, item.nodeid)


def claims(mark: pytest.Mark) -> bool:
    """Whether a limit on a test without a load is meant for us; in other suites the names are labels."""
    try:
        _READERS[mark.name](mark, mark.name)
    except pytest.UsageError:
        return False
    return True


_READERS: dict[str, Callable[[pytest.Mark, str], object]] = {
    "memory_ceiling": ceiling_of,
    "latency_budget": budget_of,
    "gpu_memory": memory_of,
}


def over_ceilings(item: pytest.Item, result: LoadResult, subject: Subject) -> tuple[list[str], list[str]]:
    """Sentences for what is over a ceiling, and for ceilings on what this run could not measure."""
    over, unmeasured = [], []
    for mark in limit_marks(item, "memory_ceiling"):
        sizes, phases = ceiling_of(mark, item.nodeid)
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
    """Sentences for medians over a budget, and for budgets that this run could not measure or compare.

    Raises LoadError where a load that was timed anew does not load any more.
    """
    over, unmeasured = [], []
    now = timings(load.timed_results)
    suspects: dict[str, tuple[Budget, Timing]] = {}
    for mark in limit_marks(item, "latency_budget"):
        for name, budget in budget_of(mark, item.nodeid).items():
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
    state: State, load: Load, suspects: Mapping[str, tuple[Budget, Timing]]
) -> tuple[list[str], list[str]]:
    """Sentences for times that are over what is recorded by more than their budget, and for those that cannot be told.

    What one process says is no more than a suspicion: it is timed in further ones, as the baselines of times are.
    """
    judgements: dict[str, tuple[str, str]] = {}
    seen: dict[str, Timing] = {}

    def judge(times: Mapping[str, Timing] | None) -> dict[str, str]:
        for name, (budget, recorded) in suspects.items():
            if times is None or name not in times:
                judgements[name] = INCONCLUSIVE, "too few processes to tell"
                continue
            judgement, words = moved(recorded, times[name], budget.relative)
            # What got faster is within the budget.
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


def _over(state: State, load: Load, name: str, now: Timing, limit: float, recorded: float | None = None) -> str:
    return failure.budget_text(
        state.subject(load.spec),
        name,
        now.median,
        limit,
        samples=len(load.timed_results[-1].samples.get(name, ())) or 1,
        processes=len(now.samples),
        recorded=recorded,
    )


def _recorded(baseline: Baseline | None, result: LoadResult, name: str, now: Timing) -> tuple[Timing | None, str]:
    """What is recorded of a time; or None, and why there is nothing to be relative to."""
    if baseline is None:
        return None, "nothing is recorded for this load"
    if why := other_identity(baseline, result):
        return None, why
    return recorded_timing(baseline, result, name, now)
