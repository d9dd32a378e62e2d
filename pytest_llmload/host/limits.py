"""``memory_ceiling`` and ``latency_budget``: limits of single tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from pytest_llmload.baselines.compare import other_identity
from pytest_llmload.baselines.timings import recorded_median, timings
from pytest_llmload.core.units import format_bytes, parse_bytes, parse_seconds
from pytest_llmload.host.markers import limit_marks
from pytest_llmload.reports import failure

if TYPE_CHECKING:
    from pytest_llmload.baselines.model import Baseline, Timing
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.verdicts import Subject
    from pytest_llmload.host.load import Load
    from pytest_llmload.host.state import State

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
    """Sentences for medians over a budget, and for budgets that this run could not measure or compare."""
    over, unmeasured = [], []
    subject = state.subject(load.spec)
    now = timings(load.timed_results)
    for mark in limit_marks(item, "latency_budget"):
        for name, budget in budget_of(mark, item.nodeid).items():
            if name not in now:
                unmeasured.append(f"latency_budget({name}={budget.text}): {name} was not measured")
                continue
            recorded, limit = None, budget.seconds
            if limit is None:
                baseline = state.store.read(state.baseline_path(load.spec))
                recorded, why = _recorded(baseline, load.result, name, now[name])
                if recorded is None:
                    unmeasured.append(f"latency_budget({name}={budget.text}): {why}")
                    continue
                limit = recorded * (1 + budget.relative)
            median, samples = now[name].median, sum(map(len, now[name].samples))
            if median > limit:
                over.append(failure.budget_text(subject, name, median, limit, samples=samples, recorded=recorded))
    return over, unmeasured


def _recorded(baseline: Baseline | None, result: LoadResult, name: str, now: Timing) -> tuple[float | None, str]:
    """The recorded median of a time, in seconds; or None, and why there is none to be relative to."""
    if baseline is None:
        return None, "nothing is recorded for this load"
    if why := other_identity(baseline, result):
        return None, why
    return recorded_median(baseline, result, name, now)
