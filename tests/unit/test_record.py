"""What is stored, from how many loads, and what is left alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
from sample_loads import ENVIRONMENT, GIB, HOST, METRICS, MIB, NF4, baseline_of, load, manifest, numbers

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.core.results import CRASHED, AllocationSite, Numbers
from pytest_llmload.core.units import Tolerance

PLAIN = "nf4 absmax=float32 block=64 compute=bf16"


@pytest.fixture
def baseline() -> Baseline:
    """As it comes from a file."""
    return loads(dumps(baseline_of(None, [load(), load()], update=True)), "x.json")


def environment(**changes: str) -> dict[str, str]:
    return {**ENVIRONMENT, **changes}


def changed_lines(old: Baseline, new: Baseline) -> list[str]:
    before, after = set(dumps(old).splitlines()), set(dumps(new).splitlines())
    return sorted(line.strip().rstrip(",") for line in after - before)


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_the_first_recording_holds_all_and_compares_as_ok() -> None:
    recording = record(None, [load(), load()], update=True)
    assert recording.baseline is not None
    assert recording.refusals == recording.accepted == recording.dropped == ()
    assert {"gpu.settled", "host.file", "manifest", "numbers", "load"} <= set(recording.recorded)
    assert compare(recording.baseline, load()).verdict == "ok"
    assert recording.baseline.memory["gpu.settled"] == METRICS["gpu.settled"]


@pytest.mark.parametrize("metric", ["gpu.weights", "gpu.load_allocations", "host.other_tensors"])
def test_what_has_to_repeat_is_refused_where_it_differs(metric: str) -> None:
    recording = record(None, [load(), load(metrics={metric: METRICS[metric] + 512})], update=True)
    assert recording.baseline is None
    assert len(recording.refusals) == 1
    assert recording.refusals[0].startswith(f"{metric} must repeat exactly but differs between 2 loads: ")
    assert f"({METRICS[metric] + 512:,})" in recording.refusals[0]


def test_a_refusal_leaves_the_old_baseline(baseline: Baseline) -> None:
    recording = record(baseline, [load(), load(metrics={"gpu.weights": 1})], update=True)
    assert recording.baseline is baseline
    assert recording.refusals


def test_modules_models_and_numbers_have_to_repeat() -> None:
    other = {"shape": "5ha9e" * 12, "weights": "0" * 64}
    twisted = dataclasses.replace(numbers(), logits=[-value for value in numbers().logits])
    for change, reason in (
        ({"manifest": manifest(PLAIN)}, "modules differ between two loads: 160 x Linear4bit: "),
        ({"digests": other}, "the digest of the model's weights differs between 2 loads"),
        ({"numbers": twisted}, "numbers cannot be recorded: relative logits error 2"),
    ):
        refusals = record(None, [load(**change), load()], update=True).refusals
        assert len(refusals) == 1
        assert refusals[0].startswith(reason)


def test_what_is_not_a_number_is_refused_from_a_single_load_too() -> None:
    nan = dataclasses.replace(numbers(), margin=[math.nan] * 4)
    assert record(None, [load(numbers=nan)], update=True).refusals == (
        "numbers cannot be recorded: the logits are not finite",
    )
    assert record(None, [load(metrics={"load": math.inf})], update=True).refusals == ("load is not a finite number",)


def test_peaks_are_the_larger_and_samples_those_of_all() -> None:
    one = load(metrics={"gpu.load_peak": 9 * GIB, "host.peak": 910 * MIB}, samples={"load": [1.0, 2.0]})
    two = load(metrics={"gpu.load_peak": 8 * GIB, "host.peak": 930 * MIB}, samples={"load": [9.0]})
    stored = baseline_of(None, [one, two], update=True)
    assert (stored.memory["gpu.load_peak"], stored.memory["host.peak"]) == (9 * GIB, 930 * MIB)
    timing = stored.time[HOST]["load"]
    assert (timing.samples, timing.median) == (((1.0, 2.0), (9.0,)), 5.25)


def test_a_cold_first_load_does_not_mix_with_warm_ones() -> None:
    cold = load(samples={"load": [60.0], "ttft": [0.05]}, environment=environment(page_cache="cold"))
    warm = load(samples={"load": [12.0], "ttft": [0.04]})
    timings = baseline_of(None, [cold, warm], update=True).time[HOST]
    assert timings["load"].samples == ((12.0,),)
    assert timings["load"].conditions == {"page_cache": "warm"}
    # The time to the first token does not depend on it.
    assert timings["ttft"].samples == ((0.05,), (0.04,))


def test_what_only_some_repeats_measured_is_not_recorded() -> None:
    stored = baseline_of(None, [load(), load(metrics={"gpu.process": None})], update=True)
    assert "gpu.process" not in stored.memory


def test_of_chosen_metrics_nothing_else_is_recorded() -> None:
    recording = record(None, [load(), load()], update=True, metrics=["host.weights", "load"])
    assert recording.baseline is not None
    assert recording.recorded == ("host.weights", "load")
    assert list(recording.baseline.memory) == ["host.weights"]
    assert list(recording.baseline.time[HOST]) == ["load"]
    assert not recording.baseline.manifest
    # The rest is missing still, and can be added.
    later = record(recording.baseline, [load(), load()], update=False, metrics=["gpu.settled", "ttft"])
    assert later.recorded == ("gpu.settled", "ttft")


@pytest.mark.parametrize("name", ["numbers", "manifest", "gpu.settled"])
def test_what_was_recorded_alone_is_compared_alone(name: str) -> None:
    alone = baseline_of(None, [load(), load()], update=True, metrics=[name])
    assert compare(alone, load(), metrics=[name]).verdict == "ok"


def test_only_loads_that_worked_and_belong_together_are_recorded() -> None:
    with pytest.raises(ValueError, match="only loads that worked"):
        record(None, [load(), load(outcome=CRASHED)], update=True)
    with pytest.raises(ValueError, match="only loads that worked"):
        record(None, [], update=True)
    with pytest.raises(ValueError, match="repeats of one spec"):
        record(None, [load(), load(dataclasses.replace(NF4, quant="fp4"))], update=True)
    nowhere = {name: value for name, value in ENVIRONMENT.items() if name != "host"}
    with pytest.raises(ValueError, match="does not name its kind of host"):
        record(None, [load(environment=nowhere)], update=True)


# --- update ----------------------------------------------------------------------------------------------------------


def test_an_update_that_changes_nothing_gives_the_same_object(baseline: Baseline) -> None:
    noisy = load(
        metrics={"gpu.settled": METRICS["gpu.settled"] + MIB, "host.peak": METRICS["host.peak"] * 1.03, "host.file": 1},
        samples={"load": [12.9], "ttft": [0.04], "per_token": [0.026]},
        environment=environment(python="3.11.9"),
    )
    recording = record(baseline, [noisy, noisy], update=True)
    assert recording.baseline is baseline
    assert recording.accepted == recording.recorded == ()


def test_an_update_rewrites_what_is_not_ok_and_leaves_the_rest(baseline: Baseline) -> None:
    moved = load(
        metrics={"gpu.settled": 8 * GIB, "gpu.load_peak": METRICS["gpu.load_peak"] + 1},
        environment=environment(python="3.11.9"),
    )
    recording = record(baseline, [moved, moved], update=True)
    assert recording.baseline is not None
    assert recording.accepted == ("gpu.settled",)
    assert changed_lines(baseline, recording.baseline) == [f'"gpu.settled": {8 * GIB}', '"python": "3.11.9"']


def test_improvements_modules_and_numbers_are_rewritten_too(baseline: Baseline) -> None:
    moved = load(
        metrics={"gpu.settled": 5 * GIB},
        manifest=manifest(PLAIN),
        numbers=dataclasses.replace(numbers(), logits=[1.0] * 16),
    )
    recording = record(baseline, [moved], update=True)
    assert set(recording.accepted) == {"gpu.settled", "manifest", "numbers"}
    assert compare(recording.baseline, moved).verdict == "ok"


def test_what_never_gates_is_no_reason_to_write_but_comes_along(baseline: Baseline) -> None:
    assert baseline_of(baseline, [load(metrics={"host.file": 1})], update=True) is baseline
    recording = record(baseline, [load(metrics={"host.file": 1, "gpu.settled": 8 * GIB})], update=True)
    assert recording.accepted == ("gpu.settled", "host.file")


def test_tolerances_and_chosen_metrics_hold_for_updates(baseline: Baseline) -> None:
    moved = load(metrics={"gpu.settled": 8 * GIB, "gpu.load_peak": 12 * GIB})
    assert record(baseline, [moved], update=True, metrics=["gpu.load_peak"]).accepted == ("gpu.load_peak",)
    loose = {"gpu.settled": Tolerance(relative=0.5)}
    assert record(baseline, [moved], update=True, tolerances=loose).accepted == ("gpu.load_peak",)


def test_sections_that_were_not_asked_for_stay(baseline: Baseline) -> None:
    moved = load(metrics={"gpu.settled": 8 * GIB}, samples={"load": [99.0]})
    assert record(baseline, [moved], update=True, sections=["time"]).accepted == ("load",)
    only_memory = record(baseline, [moved], update=True, sections=["memory"])
    assert only_memory.baseline is not None
    assert only_memory.accepted == ("gpu.settled",)
    assert only_memory.baseline.time == baseline.time


def test_another_shape_replaces_everything(baseline: Baseline) -> None:
    other = load(digests={"shape": "b0b" * 20, "weights": "3e1f" * 16}, metrics={"host.peak": None})
    recording = record(baseline, [other], update=True, sections=["memory"])
    assert recording.baseline is not None
    assert recording.baseline.shape == "b0b" * 20
    assert "host.peak" not in recording.baseline.memory
    assert recording.baseline.time == {}
    assert recording.recorded == ()
    assert "gpu.settled" in recording.accepted


def test_times_of_another_host_stand_beside_the_first(baseline: Baseline) -> None:
    other = load(environment=environment(host="other", driver="570.1", python="3.12"))
    recording = record(baseline, [other], update=True, sections=["time"])
    assert recording.baseline is not None
    assert set(recording.baseline.time) == {HOST, "other"}
    assert recording.recorded == ("load", "ttft", "per_token")
    # The memory was measured under the old driver still.
    assert recording.baseline.environment == baseline.environment


def test_numbers_of_new_weights_bring_their_digest(baseline: Baseline) -> None:
    tuned = load(digests={"shape": baseline.shape, "weights": "cafe" * 16})
    assert baseline_of(baseline, [tuned], update=True, metrics=["gpu.settled"]) is baseline
    recording = record(baseline, [tuned], update=True)
    assert recording.baseline is not None
    assert recording.accepted == ("numbers",)
    assert recording.baseline.weights == "cafe" * 16


# --- environments ----------------------------------------------------------------------------------------------------


def test_metrics_of_a_new_driver_are_rewritten_with_it(baseline: Baseline) -> None:
    newer = load(environment=environment(driver="570.1"))
    recording = record(baseline, [newer], update=True)
    assert recording.baseline is not None
    assert set(recording.accepted) == {"gpu.process", "gpu.context"}
    assert recording.baseline.environment["driver"] == "570.1"


def test_a_figure_of_the_old_environment_is_never_passed_off_as_one_of_the_new(baseline: Baseline) -> None:
    newer = load(metrics={"gpu.process": None}, environment=environment(driver="570.1"))
    recording = record(baseline, [newer], update=True)
    assert recording.baseline is not None
    assert recording.baseline.environment["driver"] == "570.1"
    assert "gpu.process" not in recording.baseline.memory
    assert recording.dropped == (
        "gpu.process: recorded in a different environment and not measured now (driver 560.28.03 -> 570.1)",
    )


def test_environments_of_which_only_kept_figures_depend_stay(baseline: Baseline) -> None:
    newer = load(
        metrics={"gpu.settled": 8 * GIB},
        environment=environment(driver="570.1", transformers="5.24.0", python="3.12"),
    )
    recording = record(baseline, [newer], update=True, metrics=["gpu.settled"])
    assert recording.baseline is not None
    kept = recording.baseline.environment
    assert (kept["driver"], kept["transformers"], kept["python"]) == ("560.28.03", "5.23.0", "3.12")
    assert recording.dropped == ()
    assert recording.baseline.memory["gpu.load_allocated"] == METRICS["gpu.load_allocated"]


def test_what_several_entries_rule_out_is_dropped_once(baseline: Baseline) -> None:
    newer = load(metrics={"gpu.load_allocated": None}, environment=environment(torch="2.13.1", transformers="5.24.0"))
    recording = record(baseline, [newer], update=True)
    assert "gpu.load_allocations" in recording.accepted
    assert [text.partition(":")[0] for text in recording.dropped] == ["gpu.load_allocated"]


def test_numbers_are_dropped_with_the_torch_that_made_them(baseline: Baseline) -> None:
    newer = load(numbers=Numbers(), environment=environment(torch="2.14.0"))
    recording = record(baseline, [newer], update=True)
    assert recording.baseline is not None
    assert recording.baseline.numbers == Numbers()
    assert recording.dropped[0].startswith("numbers: recorded in a different environment")


# --- record missing --------------------------------------------------------------------------------------------------


def test_record_missing_writes_only_what_is_not_there(baseline: Baseline) -> None:
    partial = dataclasses.replace(
        baseline, memory={k: v for k, v in baseline.memory.items() if k not in ("gpu.process", "host.file")}
    )
    moved = load(metrics={"gpu.settled": 8 * GIB}, environment=environment(python="3.12"))
    recording = record(partial, [moved], update=False)
    assert recording.baseline is not None
    assert set(recording.recorded) == {"gpu.process", "host.file"}
    assert recording.accepted == ()
    assert recording.baseline.memory["gpu.settled"] == METRICS["gpu.settled"]


def test_record_missing_writes_new_files_and_new_sections(baseline: Baseline) -> None:
    assert baseline_of(None, [load()], update=False) == baseline_of(None, [load()], update=True)
    without_time = dataclasses.replace(baseline, time={})
    assert baseline_of(without_time, [load(), load()], update=False) == baseline
    only_time = baseline_of(None, [load(), load()], update=True, sections=["time"])
    assert baseline_of(only_time, [load(), load()], update=False) == baseline


def test_record_missing_adds_a_host_and_keeps_the_times_of_the_first(baseline: Baseline) -> None:
    slower = load(samples={"load": [99.0]}, environment=environment(host="other"))
    recording = record(baseline, [slower], update=False)
    assert recording.baseline is not None
    assert recording.recorded == ("load", "ttft", "per_token")
    assert recording.baseline.time[HOST] == baseline.time[HOST]
    assert baseline_of(baseline, [load(samples={"load": [99.0]})], update=False) is baseline


def test_record_missing_never_touches_another_loads_baseline(baseline: Baseline) -> None:
    other = load(digests={"shape": "b0b" * 20, "weights": "3e1f" * 16})
    assert baseline_of(baseline, [other], update=False) is baseline


def test_record_missing_does_not_mix_environments(baseline: Baseline) -> None:
    partial = dataclasses.replace(baseline, memory={k: v for k, v in baseline.memory.items() if k != "gpu.process"})
    assert baseline_of(partial, [load(environment=environment(driver="570.1"))], update=False) is partial


def test_what_the_suite_recorded_stays_its_own(baseline: Baseline) -> None:
    assert not baseline.suite
    suites = baseline_of(None, [load()], update=True, suite=True)
    assert suites.suite
    moved = baseline_of(suites, [load(metrics={"gpu.settled": 1})], update=True)
    assert moved is not suites
    assert moved.suite
    other = load(digests={"shape": "other", "weights": "other"})
    assert baseline_of(suites, [other], update=True).suite


def test_lines_that_allocate_belong_to_the_figures_of_their_load(baseline: Baseline) -> None:
    now, more = load(), load(metrics={"gpu.settled": 9e9})
    now.allocations = [AllocationSite("load", "host", "a.py:1 in f", 3 << 20, baseline=7)]
    more.allocations = [AllocationSite("load", "host", "b.py:1 in f", 9 << 20)]
    # They are added where nothing else is to write, and never replaced where nothing is.
    added = record(baseline, [now, load()], update=True)
    assert (added.accepted, added.recorded) == ((), ())
    assert added.baseline == dataclasses.replace(
        baseline, allocations=(AllocationSite("load", "host", "a.py:1 in f", 3 << 20),)
    )
    again = dataclasses.replace(now, allocations=more.allocations)
    assert record(added.baseline, [again], update=True).baseline is added.baseline
    # New figures bring theirs, or remove those of the old ones.
    replaced = record(added.baseline, [more], update=True).baseline
    assert replaced is not None
    assert replaced.allocations == tuple(more.allocations)
    more.allocations = []
    removed = record(added.baseline, [more], update=True).baseline
    assert removed is not None
    assert removed.allocations == ()
