"""What is stored, from how many loads, and what is left alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
from sample_loads import ENVIRONMENT, GIB, HOST, METRICS, MIB, NF4, load, manifest, numbers

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.record import record
from pytest_llmload.core.results import CRASHED, Numbers
from pytest_llmload.core.units import Tolerance

PLAIN = "nf4 absmax=float32 block=64 compute=bf16"


@pytest.fixture
def baseline():
    """As it comes from a file."""
    return loads(dumps(record(None, [load(), load()], update=True).baseline), "x.json")


def environment(**changes):
    return {**ENVIRONMENT, **changes}


def changed_lines(old, new):
    before, after = set(dumps(old).splitlines()), set(dumps(new).splitlines())
    return sorted(line.strip().rstrip(",") for line in after - before)


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_the_first_recording_holds_all_and_compares_as_ok():
    recording = record(None, [load(), load()], update=True)
    assert recording.refusals == recording.accepted == recording.dropped == ()
    assert {"gpu.settled", "host.file", "manifest", "numbers", "load"} <= set(recording.recorded)
    assert compare(recording.baseline, load()).verdict == "ok"
    assert recording.baseline.memory["gpu.settled"] == METRICS["gpu.settled"]


@pytest.mark.parametrize("metric", ["gpu.weights", "gpu.load_allocations", "host.other_tensors"])
def test_what_has_to_repeat_is_refused_where_it_differs(metric):
    recording = record(None, [load(), load(metrics={metric: METRICS[metric] + 512})], update=True)
    assert recording.baseline is None
    assert len(recording.refusals) == 1
    assert recording.refusals[0].startswith(f"{metric} has to repeat exactly and differs between 2 loads: ")
    assert f"({METRICS[metric] + 512:,})" in recording.refusals[0]


def test_a_refusal_leaves_the_old_baseline(baseline):
    recording = record(baseline, [load(), load(metrics={"gpu.weights": 1})], update=True)
    assert recording.baseline is baseline
    assert recording.refusals


def test_modules_models_and_numbers_have_to_repeat():
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


def test_what_is_not_a_number_is_refused_from_a_single_load_too():
    nan = dataclasses.replace(numbers(), margin=[math.nan] * 4)
    assert record(None, [load(numbers=nan)], update=True).refusals == (
        "numbers cannot be recorded: the logits are not finite",
    )
    assert record(None, [load(metrics={"load": math.inf})], update=True).refusals == ("load is not a finite number",)


def test_peaks_are_the_larger_and_samples_those_of_all():
    one = load(metrics={"gpu.load_peak": 9 * GIB, "host.peak": 910 * MIB}, samples={"load": [1.0, 2.0]})
    two = load(metrics={"gpu.load_peak": 8 * GIB, "host.peak": 930 * MIB}, samples={"load": [9.0]})
    stored = record(None, [one, two], update=True).baseline
    assert (stored.memory["gpu.load_peak"], stored.memory["host.peak"]) == (9 * GIB, 930 * MIB)
    timing = stored.time[HOST]["load"]
    assert (timing.samples, timing.median) == (((1.0, 2.0), (9.0,)), 5.25)


def test_a_cold_first_load_does_not_mix_with_warm_ones():
    cold = load(samples={"load": [60.0], "ttft": [0.05]}, environment=environment(page_cache="cold"))
    warm = load(samples={"load": [12.0], "ttft": [0.04]})
    timings = record(None, [cold, warm], update=True).baseline.time[HOST]
    assert timings["load"].samples == ((12.0,),)
    assert timings["load"].conditions == {"page_cache": "warm"}
    # The time to the first token does not depend on it.
    assert timings["ttft"].samples == ((0.05,), (0.04,))


def test_what_only_some_repeats_measured_is_not_recorded():
    stored = record(None, [load(), load(metrics={"gpu.process": None})], update=True).baseline
    assert "gpu.process" not in stored.memory


def test_of_chosen_metrics_nothing_else_is_recorded():
    recording = record(None, [load(), load()], update=True, metrics=["host.weights", "load"])
    assert recording.recorded == ("host.weights", "load")
    assert list(recording.baseline.memory) == ["host.weights"]
    assert list(recording.baseline.time[HOST]) == ["load"]
    assert not recording.baseline.manifest
    # The rest is missing still, and can be added.
    later = record(recording.baseline, [load(), load()], update=False, metrics=["gpu.settled", "ttft"])
    assert later.recorded == ("gpu.settled", "ttft")


@pytest.mark.parametrize("name", ["numbers", "manifest", "gpu.settled"])
def test_what_was_recorded_alone_is_compared_alone(name):
    alone = record(None, [load(), load()], update=True, metrics=[name]).baseline
    assert compare(alone, load(), metrics=[name]).verdict == "ok"


def test_only_loads_that_worked_and_belong_together_are_recorded():
    with pytest.raises(ValueError, match="only loads that worked"):
        record(None, [load(), load(outcome=CRASHED)], update=True)
    with pytest.raises(ValueError, match="only loads that worked"):
        record(None, [], update=True)
    with pytest.raises(ValueError, match="repeats of one spec"):
        record(None, [load(), load(dataclasses.replace(NF4, quant="fp4"))], update=True)
    nowhere = {name: value for name, value in ENVIRONMENT.items() if name != "host"}
    with pytest.raises(ValueError, match="on which kind of host"):
        record(None, [load(environment=nowhere)], update=True)


# --- update ----------------------------------------------------------------------------------------------------------


def test_an_update_that_changes_nothing_gives_the_same_object(baseline):
    noisy = load(
        metrics={"gpu.settled": METRICS["gpu.settled"] + MIB, "host.peak": METRICS["host.peak"] * 1.03, "host.file": 1},
        samples={"load": [12.9], "ttft": [0.04], "per_token": [0.026]},
        environment=environment(python="3.11.9"),
    )
    recording = record(baseline, [noisy, noisy], update=True)
    assert recording.baseline is baseline
    assert recording.accepted == recording.recorded == ()


def test_an_update_rewrites_what_is_not_ok_and_leaves_the_rest(baseline):
    moved = load(
        metrics={"gpu.settled": 8 * GIB, "gpu.load_peak": METRICS["gpu.load_peak"] + 1},
        environment=environment(python="3.11.9"),
    )
    recording = record(baseline, [moved, moved], update=True)
    assert recording.accepted == ("gpu.settled",)
    assert changed_lines(baseline, recording.baseline) == [f'"gpu.settled": {8 * GIB}', '"python": "3.11.9"']


def test_improvements_modules_and_numbers_are_rewritten_too(baseline):
    moved = load(
        metrics={"gpu.settled": 5 * GIB},
        manifest=manifest(PLAIN),
        numbers=dataclasses.replace(numbers(), logits=[1.0] * 16),
    )
    recording = record(baseline, [moved], update=True)
    assert set(recording.accepted) == {"gpu.settled", "manifest", "numbers"}
    assert compare(recording.baseline, moved).verdict == "ok"


def test_what_never_gates_is_no_reason_to_write_but_comes_along(baseline):
    assert record(baseline, [load(metrics={"host.file": 1})], update=True).baseline is baseline
    recording = record(baseline, [load(metrics={"host.file": 1, "gpu.settled": 8 * GIB})], update=True)
    assert recording.accepted == ("gpu.settled", "host.file")


def test_tolerances_and_chosen_metrics_hold_for_updates(baseline):
    moved = load(metrics={"gpu.settled": 8 * GIB, "gpu.load_peak": 12 * GIB})
    assert record(baseline, [moved], update=True, metrics=["gpu.load_peak"]).accepted == ("gpu.load_peak",)
    loose = {"gpu.settled": Tolerance(relative=0.5)}
    assert record(baseline, [moved], update=True, tolerances=loose).accepted == ("gpu.load_peak",)


def test_sections_that_were_not_asked_for_stay(baseline):
    moved = load(metrics={"gpu.settled": 8 * GIB}, samples={"load": [99.0]})
    assert record(baseline, [moved], update=True, sections=["time"]).accepted == ("load",)
    only_memory = record(baseline, [moved], update=True, sections=["memory"])
    assert only_memory.accepted == ("gpu.settled",)
    assert only_memory.baseline.time == baseline.time


def test_another_shape_replaces_everything(baseline):
    other = load(digests={"shape": "b0b" * 20, "weights": "3e1f" * 16}, metrics={"host.peak": None})
    recording = record(baseline, [other], update=True, sections=["memory"])
    assert recording.baseline.shape == "b0b" * 20
    assert "host.peak" not in recording.baseline.memory
    assert recording.baseline.time == {}
    assert recording.recorded == ()
    assert "gpu.settled" in recording.accepted


def test_times_of_another_host_stand_beside_the_first(baseline):
    other = load(environment=environment(host="other", driver="570.1", python="3.12"))
    recording = record(baseline, [other], update=True, sections=["time"])
    assert set(recording.baseline.time) == {HOST, "other"}
    assert recording.recorded == ("load", "ttft", "per_token")
    # The memory was measured under the old driver still.
    assert recording.baseline.environment == baseline.environment


def test_numbers_of_new_weights_bring_their_digest(baseline):
    tuned = load(digests={"shape": baseline.shape, "weights": "cafe" * 16})
    assert record(baseline, [tuned], update=True, metrics=["gpu.settled"]).baseline is baseline
    recording = record(baseline, [tuned], update=True)
    assert recording.accepted == ("numbers",)
    assert recording.baseline.weights == "cafe" * 16


# --- surroundings ----------------------------------------------------------------------------------------------------


def test_metrics_of_a_new_driver_are_rewritten_with_it(baseline):
    newer = load(environment=environment(driver="570.1"))
    recording = record(baseline, [newer], update=True)
    assert set(recording.accepted) == {"gpu.process", "gpu.context"}
    assert recording.baseline.environment["driver"] == "570.1"


def test_a_figure_of_the_old_surroundings_is_never_passed_off_as_one_of_the_new(baseline):
    newer = load(metrics={"gpu.process": None}, environment=environment(driver="570.1"))
    recording = record(baseline, [newer], update=True)
    assert recording.baseline.environment["driver"] == "570.1"
    assert "gpu.process" not in recording.baseline.memory
    assert recording.dropped == (
        "gpu.process: recorded under other surroundings and not measured now (driver 560.28.03 -> 570.1)",
    )


def test_surroundings_of_which_only_kept_figures_depend_stay(baseline):
    newer = load(
        metrics={"gpu.settled": 8 * GIB},
        environment=environment(driver="570.1", transformers="5.24.0", python="3.12"),
    )
    recording = record(baseline, [newer], update=True, metrics=["gpu.settled"])
    kept = recording.baseline.environment
    assert (kept["driver"], kept["transformers"], kept["python"]) == ("560.28.03", "5.23.0", "3.12")
    assert recording.dropped == ()
    assert recording.baseline.memory["gpu.load_allocated"] == METRICS["gpu.load_allocated"]


def test_what_several_entries_rule_out_is_dropped_once(baseline):
    newer = load(metrics={"gpu.load_allocated": None}, environment=environment(torch="2.13.1", transformers="5.24.0"))
    recording = record(baseline, [newer], update=True)
    assert "gpu.load_allocations" in recording.accepted
    assert [text.partition(":")[0] for text in recording.dropped] == ["gpu.load_allocated"]


def test_numbers_are_dropped_with_the_torch_that_made_them(baseline):
    newer = load(numbers=Numbers(), environment=environment(torch="2.14.0"))
    recording = record(baseline, [newer], update=True)
    assert recording.baseline.numbers == Numbers()
    assert recording.dropped[0].startswith("numbers: recorded under other surroundings")


# --- record missing --------------------------------------------------------------------------------------------------


def test_record_missing_writes_only_what_is_not_there(baseline):
    partial = dataclasses.replace(
        baseline, memory={k: v for k, v in baseline.memory.items() if k not in ("gpu.process", "host.file")}
    )
    moved = load(metrics={"gpu.settled": 8 * GIB}, environment=environment(python="3.12"))
    recording = record(partial, [moved], update=False)
    assert set(recording.recorded) == {"gpu.process", "host.file"}
    assert recording.accepted == ()
    assert recording.baseline.memory["gpu.settled"] == METRICS["gpu.settled"]


def test_record_missing_writes_new_files_and_new_sections(baseline):
    assert record(None, [load()], update=False).baseline == record(None, [load()], update=True).baseline
    without_time = dataclasses.replace(baseline, time={})
    assert record(without_time, [load(), load()], update=False).baseline == baseline
    only_time = record(None, [load(), load()], update=True, sections=["time"]).baseline
    assert record(only_time, [load(), load()], update=False).baseline == baseline


def test_record_missing_adds_a_host_and_keeps_the_times_of_the_first(baseline):
    slower = load(samples={"load": [99.0]}, environment=environment(host="other"))
    recording = record(baseline, [slower], update=False)
    assert recording.recorded == ("load", "ttft", "per_token")
    assert recording.baseline.time[HOST] == baseline.time[HOST]
    assert record(baseline, [load(samples={"load": [99.0]})], update=False).baseline is baseline


def test_record_missing_never_touches_another_loads_baseline(baseline):
    other = load(digests={"shape": "b0b" * 20, "weights": "3e1f" * 16})
    assert record(baseline, [other], update=False).baseline is baseline


def test_record_missing_does_not_mix_surroundings(baseline):
    partial = dataclasses.replace(baseline, memory={k: v for k, v in baseline.memory.items() if k != "gpu.process"})
    assert record(partial, [load(environment=environment(driver="570.1"))], update=False).baseline is partial


def test_what_the_suite_recorded_stays_its_own(baseline):
    assert not baseline.suite
    suites = record(None, [load()], update=True, suite=True).baseline
    assert suites.suite
    moved = record(suites, [load(metrics={"gpu.settled": 1})], update=True).baseline
    assert moved is not suites
    assert moved.suite
    other = load(digests={"shape": "other", "weights": "other"})
    assert record(suites, [other], update=True).baseline.suite
