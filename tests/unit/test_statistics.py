"""``judge``: what it says of samples whose truth is known, made up and recorded."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.baselines.model import RecordedTime
from pytest_llmload.baselines.statistics import judge, student
from pytest_llmload.baselines.timings import moved, timings, undecided
from pytest_llmload.core.results import LOADED, LoadResult

SAMPLES = Path(__file__).parents[2] / "benchmarks" / "samples"


def side(
    seed: str,
    processes: int = 10,
    samples: int = 30,
    *,
    factor: float = 1.0,
    between: float = 0.04,
    within: float = 0.05,
) -> list[list[float]]:
    """Processes that scatter by ``between``, and their samples by ``within``: deviations of the logarithm."""
    draw = random.Random(seed)
    centres = [draw.gauss(0.0, between) for _ in range(processes)]
    return [[0.02 * factor * math.exp(centre + draw.gauss(0.0, within)) for _ in range(samples)] for centre in centres]


def verdicts(factor: float, pairs: int = 60, **shape: Any) -> Counter[str]:
    found = (judge(side(f"a{seed}", **shape), side(f"b{seed}", factor=factor, **shape)) for seed in range(pairs))
    return Counter(judgement.verdict for judgement in found)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 63.657), (2, 9.925), (3, 5.841), (4, 4.604), (9, 3.250), (30, 2.750), (math.inf, 2.576)],
)
def test_students_t(freedom: float, quantile: float) -> None:
    assert student(0.995, freedom) == pytest.approx(quantile, rel=1e-3)


def test_between_one_and_two_degrees_of_freedom_it_falls() -> None:
    quantiles = [student(0.995, 1 + step / 8) for step in range(17)]
    assert quantiles == sorted(quantiles, reverse=True)


def test_clean_comparisons_raise_no_alarm() -> None:
    clean = verdicts(1.0)
    assert set(clean) <= {"ok", "inconclusive"}
    assert clean["ok"] >= 30


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, "regressed"), (1 / 1.3, "improved")])
def test_what_moved_far_is_seen(factor: float, verdict: str) -> None:
    assert verdicts(factor)[verdict] >= 58


def test_ten_percent_are_seen_with_as_many_processes_as_are_recorded() -> None:
    assert verdicts(1.1, processes=20)["regressed"] >= 57


def test_a_change_below_the_tolerance_is_ok() -> None:
    assert verdicts(1.02, processes=20)["ok"] >= 55


def test_the_tolerance_is_the_callers() -> None:
    baseline, current = side("a", between=0.01), side("b", factor=1.2, between=0.01)
    assert judge(baseline, current).verdict == "regressed"
    assert judge(baseline, current, tolerance=0.5).verdict == "ok"


def test_many_samples_of_few_processes_prove_nothing() -> None:
    # Whatever within one process says, the next may be a fifth slower.
    assert set(verdicts(1.0, processes=2, samples=300, between=0.2)) == {"inconclusive"}
    assert set(verdicts(1.3, processes=2)) == {"inconclusive"}
    judgement = judge([[1.0]], [[2.0]])
    assert judgement.ratio == pytest.approx(2.0)
    assert judgement.interval == (0.0, math.inf)


def test_the_interval_holds_the_ratio() -> None:
    judgement = judge(side("a"), side("b", factor=1.2))
    low, high = judgement.interval
    assert low < judgement.ratio < high
    assert judgement.ratio == pytest.approx(1.2, rel=0.06)


def test_one_process_in_a_slow_moment_is_no_regression() -> None:
    current = side("b")
    current[3] = [sample * 4 for sample in current[3]]
    assert judge(side("a"), current).verdict != "regressed"


def test_it_is_a_function_of_its_arguments_in_any_order() -> None:
    one, two = side("a"), side("b")
    shuffled = [random.Random(7).sample(process, len(process)) for process in one]
    assert judge(one, two) == judge(one, two) == judge(shuffled, two)


@pytest.mark.parametrize(
    ("baseline", "current", "message"),
    [
        ([], [[1.0]], "baseline: no samples"),
        ([[1.0]], [[1.0], []], "current: no samples"),
        ([[1.0]], [[0.0]], "current: 0.0 is not a time"),
        ([[math.nan]], [[1.0]], "baseline: nan is not a time"),
    ],
)
def test_what_is_no_time_is_refused(baseline: list[list[float]], current: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(baseline, current)
    with pytest.raises(ValueError, match="tolerance"):
        judge([[1.0]], [[1.0]], tolerance=0.0)


def test_a_verdict_takes_no_time() -> None:
    baseline, current = side("a", 5, 160), side("b", 5, 160)
    begin = time.process_time()
    judge(baseline, current)
    assert time.process_time() - begin < 0.5


# --- with the control ------------------------------------------------------------------------------------------------


def timing(
    seed: str, *, model: float = 1.0, host: Callable[[], float] | None = None, processes: int = 20
) -> RecordedTime:
    """Processes on a host that is ``host(process)`` times slower than at its best, for model and control alike."""
    draw = random.Random(seed)
    speeds = [(host or (lambda: draw.uniform(1.0, 2.0)))() for _ in range(processes)]
    noise = [[math.exp(draw.gauss(0.0, 0.02)) for _ in range(11)] for _ in speeds]
    samples = [[0.01 * model * speed * part for part in parts] for speed, parts in zip(speeds, noise, strict=True)]
    relative = [[5.0 * model * part for part in parts] for parts in noise]
    return RecordedTime(
        0.01, tuple(map(tuple, samples)), {}, tuple(map(tuple, relative)), tuple(0.002 * speed for speed in speeds)
    )


def test_a_host_that_wavers_hides_nothing_from_the_control() -> None:
    assert judge(timing("a").samples, timing("b", model=1.1).samples).verdict == "inconclusive"
    assert moved(timing("a"), timing("b", model=1.1), 0.1)[0].verdict == "regressed"
    assert moved(timing("a"), timing("b"), 0.1)[0].verdict == "ok"


def test_a_slower_host_is_no_regression_of_the_model() -> None:
    calm, slow = timing("a", host=lambda: 1.0), timing("b", host=lambda: 1.5)
    assert judge(calm.samples, slow.samples).verdict == "regressed"
    judgement, words = moved(calm, slow, 0.1)
    assert judgement.verdict == "ok"
    assert "control" in words


def test_a_control_that_moved_alone_raises_no_alarm() -> None:
    """The model takes as long as before; the control, which is not all of a host, is faster."""
    before, after = timing("a", host=lambda: 1.0), timing("b", host=lambda: 1.0)
    faster = dataclasses.replace(after, relative=tuple(tuple(1.3 * part for part in parts) for parts in after.relative))
    judgement, words = moved(before, faster, 0.1)
    assert judgement.verdict == "inconclusive"
    assert words.startswith("of the control's, 1.3 times the baseline's (")
    assert "; the time itself is 0.997 times the baseline's (" in words
    slower = dataclasses.replace(faster, samples=tuple(tuple(0.7 * part for part in parts) for parts in after.samples))
    assert moved(before, slower, 0.1)[0].verdict == "inconclusive"


def test_a_control_that_scatters_hides_no_time_that_stayed_and_finds_none_that_moved() -> None:
    draw = random.Random(1)
    before, after, slow = timing("a", host=lambda: 1.0), timing("b", host=lambda: 1.0), timing("c", host=lambda: 1.3)

    def scattered(found: RecordedTime) -> RecordedTime:
        factors = [draw.uniform(0.2, 2.0) for _ in found.relative]
        relative = [tuple(part * by for part in parts) for parts, by in zip(found.relative, factors, strict=True)]
        return dataclasses.replace(found, relative=tuple(relative))

    before = scattered(before)
    judgement, words = moved(before, scattered(after), 0.1)
    assert (judgement.verdict, "control" in words) == ("ok", False)
    assert moved(before, scattered(slow), 0.1)[0].verdict == "inconclusive"


def test_without_a_control_the_times_are_judged() -> None:
    before, after = (
        RecordedTime(1.0, tuple(map(tuple, side(seed, factor=factor)))) for seed, factor in (("a", 1.0), ("b", 1.3))
    )
    judgement, words = moved(before, after, 0.1)
    assert judgement.verdict == "regressed"
    assert "control" not in words


def test_an_alarm_is_seen_twice() -> None:
    assert undecided({}, {"load": "regressed", "ttft": "ok"})
    assert not undecided({"load": "regressed"}, {"load": "regressed", "ttft": "ok"})
    assert undecided({"load": "improved"}, {"load": "regressed"})
    assert undecided({"load": "inconclusive"}, {"load": "inconclusive"})
    assert not undecided({"load": "inconclusive"}, {"load": "ok", "ttft": "incomparable"})


def test_a_process_is_kept_as_its_deciles() -> None:
    samples = [0.001 * number for number in range(1, 102)]
    result = LoadResult({}, LOADED, samples={"per_token": samples, "ttft": [0.3, 0.1, 0.2]})
    found = timings([result, result])
    assert found["per_token"].samples[0] == pytest.approx([0.001 * (1 + 10 * step) for step in range(11)])
    assert found["per_token"].median == pytest.approx(0.051)
    assert found["ttft"].samples == ((0.1, 0.2, 0.3),) * 2


# --- recorded on machines --------------------------------------------------------------------------------------------


def recorded(name: str) -> list[LoadResult]:
    """Every process that generated in the last session of a folder of ``benchmarks/samples``, as a result."""
    rows = json.loads(max((SAMPLES / name).glob("*.json")).read_text())["processes"]
    return [
        LoadResult({}, LOADED, samples=row["samples"], environment={"page_cache": row["page_cache"]})
        for row in rows
        if "control" in row["samples"]
    ]


@pytest.mark.parametrize("metric", ["ttft", "per_token"])
@pytest.mark.parametrize("name", ["h100-llama-1b", "cpu-tiny-llama", "cpu-moe-128m"])
def test_on_a_real_machine_a_slowdown_is_seen_and_nothing_else(name: str, metric: str) -> None:
    draw = random.Random(f"{name} {metric}")
    results = recorded(name)
    slower = []
    for result in results:
        samples = {key: [value * 1.1 for value in values] for key, values in result.samples.items()}
        samples["control"] = result.samples["control"]
        slower.append(LoadResult({}, LOADED, samples=samples, environment=result.environment))
    clean, planted = Counter[str](), Counter[str]()
    for _ in range(25):
        baseline = timings(draw.choices(results, k=20))[metric]
        clean[moved(baseline, timings(draw.choices(results, k=20))[metric], 0.1)[0].verdict] += 1
        planted[moved(baseline, timings(draw.choices(slower, k=20))[metric], 0.1)[0].verdict] += 1
    assert clean["regressed"] == 0
    assert planted["regressed"] >= 24
