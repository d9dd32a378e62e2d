"""Budgets relative to a baseline: what one process says is a suspicion, and several decide."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sample_loads import HOST, NF4, baseline_of, load

from pytest_llmload.baselines.timings import timings
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.runs import Subject
from pytest_llmload.host.checks.limits import over_budgets
from pytest_llmload.host.markers.limits import Budget

#: Times of each process, in turn: what noise there is repeats.
NOISE = (1.0, 1.01, 0.99, 1.005, 0.995)


def process(seconds: float, place: int = 0) -> LoadResult:
    """One process, all of whose samples are ``seconds`` but for a little noise."""
    taken = seconds * NOISE[place % len(NOISE)]
    return load(samples={"load": [taken], "ttft": [taken] * 3, "per_token": [taken] * 3})


class Timed:
    """A load whose further processes all take ``then``; its own took ``first``."""

    spec = NF4

    def __init__(self, first: float, then: float) -> None:
        self.result = process(first)
        self._then = then
        self.further: list[LoadResult] = []

    @property
    def timed_results(self) -> list[LoadResult]:
        return self.further or [self.result]

    def timed(self, processes: int, loads: int, until: float) -> list[LoadResult]:
        self.further = [process(self._then, place) for place in range(max(processes, loads))]
        return self.further


class Item(SimpleNamespace):
    def iter_markers_with_node(self, name: str) -> Iterator[tuple[Item, pytest.Mark]]:
        yield self, pytest.mark.latency_budget(**self.budgets).mark


def judged(timed: Timed, without: str = "", **budgets: str) -> tuple[list[str], list[str]]:
    recorded = [process(1.0, place) for place in range(5)]
    times = {name: time for name, time in timings(recorded).items() if name != without}
    baseline = baseline_of(None, recorded, update=True, times=times)
    state: Any = SimpleNamespace(
        store=SimpleNamespace(read=lambda path: baseline),
        baseline_path=lambda spec: "b.json",
        subject=lambda spec: Subject("m", "nf4", "cpu"),
        settings=SimpleNamespace(latency_time=60.0),
    )
    item: Any = Item(nodeid="test_a", budgets=budgets)
    load: Any = timed
    return over_budgets(item, load, state)


@pytest.mark.parametrize("name", ["load", "per_token"])
def test_one_slow_process_is_no_alarm(name: str) -> None:
    timed = Timed(first=1.5, then=1.0)
    assert judged(timed, **{name: "+10%"}) == ([], [])
    assert len(timed.further) >= 5


@pytest.mark.parametrize(
    ("changes", "without", "reason"),
    [
        ({"host": "nvidia-h100/other"}, "", f"recorded on {HOST}; this host is nvidia-h100/other"),
        ({"page_cache": "cold"}, "", "page_cache warm -> cold"),
        ({}, "load", "the baseline does not have load"),
    ],
)
def test_a_budget_without_a_time_to_compare_with_says_why(changes: dict[str, str], without: str, reason: str) -> None:
    timed = Timed(first=1.5, then=1.5)
    timed.result.environment = {**timed.result.environment, **changes}
    assert judged(timed, without, load="+10%") == ([], [f"latency_budget(load=+10%): {reason}"])


def test_what_is_over_in_every_process_is() -> None:
    (text,), unmeasured = judged(Timed(first=1.5, then=1.5), per_token="+10%")
    assert "per_token is 1.50 s (median of " in text
    assert " processes), over the budget of 1.10 s, +10 % over the recorded 1.00 s" in text
    assert not unmeasured


def test_what_is_within_its_budget_starts_no_process() -> None:
    timed = Timed(first=1.05, then=9.0)
    assert judged(timed, load="+10%", ttft="+20%") == ([], [])
    assert not timed.further


def test_what_is_certainly_slower_but_within_the_budget_passes() -> None:
    assert judged(Timed(first=1.5, then=1.07), ttft="+10%") == ([], [])


def test_what_cannot_be_told_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(first=1.5, then=1.5)
    monkeypatch.setattr(timed, "timed", lambda *_: [timed.result])
    over, (text,) = judged(timed, ttft="+10%")
    assert not over
    assert text == "latency_budget(ttft=+10%): undecided, too few processes to tell"


def test_an_absolute_budget_says_on_what_its_median_rests() -> None:
    (text, other), _ = judged(Timed(first=1.5, then=1.0), load="1s", ttft="1s")
    assert "load is 1.50 s (1 sample), over" in text
    assert "ttft is 1.50 s (median of 3 samples), over" in other


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="two times are never equal"):
        Budget.parse("+0%")
