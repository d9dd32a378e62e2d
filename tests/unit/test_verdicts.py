"""The table of verdicts, row by row, as the documentation promises it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from sample_loads import NF4, load

from pytest_llmload.core.results import CRASHED, NOT_APPLIED
from pytest_llmload.core.runs import Run
from pytest_llmload.core.verdicts import ERROR, FAIL, PASS, SKIP, TABLE, Comparison, MetricVerdict, outcome, worst

#: verdict, about one metric only -> default, strict, update, record-missing; ``+`` where the baseline is written.
PROMISED = {
    ("ok", False): ("pass", "pass", "pass", "pass"),
    ("regressed", False): ("fail", "fail", "pass+", "fail"),
    ("changed", False): ("fail", "fail", "pass+", "fail"),
    ("improved", False): ("pass", "fail", "pass+", "pass"),
    ("missing", False): ("fail", "fail", "pass+", "pass+"),
    ("incomparable", False): ("fail", "fail", "pass+", "fail"),
    ("incomparable", True): ("pass", "fail", "pass+", "pass"),
    ("inconclusive", False): ("pass", "fail", "pass+", "pass"),
    ("unavailable", False): ("pass", "fail", "pass", "pass"),
    ("not_applied", False): ("fail", "fail", "fail", "fail"),
    ("out_of_memory", False): ("fail", "fail", "fail", "fail"),
    ("crashed", False): ("fail", "fail", "fail", "fail"),
    ("timeout", False): ("fail", "fail", "fail", "fail"),
    ("failed", False): ("fail", "fail", "fail", "fail"),
    ("over_limit", False): ("fail", "fail", "fail", "fail"),
    ("machine", False): ("error", "error", "error", "error"),
    ("skipped", False): ("skip", "error", "skip", "skip"),
    ("stale", False): ("pass", "error", "pass", "pass"),
    ("nothing_measured", False): ("error", "error", "error", "error"),
}
MODES = [{}, {"strict": True}, {"update": True}, {"record_missing": True}]


@pytest.mark.parametrize(("verdict", "metric_only"), PROMISED)
@pytest.mark.parametrize("mode", range(4), ids=["default", "strict", "update", "record-missing"])
def test_every_verdict_in_every_mode(verdict: str, metric_only: bool, mode: int) -> None:
    found = outcome(verdict, metric_only=metric_only, **MODES[mode])
    assert f"{found.status}{'+' if found.writes else ''}" == PROMISED[verdict, metric_only][mode]


def test_the_table_has_no_row_that_is_not_promised() -> None:
    assert {(verdict, row.metric_only) for row in TABLE for verdict in row.verdicts} == set(PROMISED)


@pytest.mark.parametrize(
    ("verdict", "mode", "listed"),
    [
        ("improved", {}, "slack"),
        ("regressed", {"update": True}, "accepted"),
        ("missing", {"record_missing": True}, "recorded"),
        ("unavailable", {}, "once"),
        ("stale", {}, "stale"),
    ],
)
def test_what_passes_without_being_ok_is_listed(verdict: str, mode: dict[str, Any], listed: str) -> None:
    assert outcome(verdict, **mode).listed == listed


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ("regressed", PASS),
        ("improved", PASS),
        ("missing", PASS),
        ("unavailable", FAIL),
        ("stale", ERROR),
        ("crashed", FAIL),
    ],
)
def test_strict_decides_about_what_an_update_does_not_write(verdict: str, status: str) -> None:
    assert outcome(verdict, strict=True, update=True).status == status


def test_record_missing_under_strict_records_and_gates_the_rest() -> None:
    assert outcome("missing", strict=True, record_missing=True).status == PASS
    assert outcome("improved", strict=True, record_missing=True).status == FAIL


def test_an_unknown_word_is_an_error() -> None:
    with pytest.raises(KeyError, match="'fine' is not a verdict"):
        outcome("fine")


def test_the_worst_verdict_wins() -> None:
    assert worst([]) == "ok"
    assert worst(["ok", "unavailable", "improved"]) == "improved"
    assert worst(["improved", "missing"]) == "missing"
    assert worst(["changed", "regressed", "missing"]) == "regressed"


def test_the_same_word_about_a_metric_passes_and_about_the_whole_fails() -> None:
    assert Comparison("memory", "incomparable").outcome().status == PASS
    assert Comparison("memory", "incomparable", whole=True).outcome().status == FAIL


def test_a_runs_verdict_is_how_its_load_ended_or_the_worst_comparison() -> None:
    device = "cpu-x86_64"
    assert Run(NF4, device, load(outcome=NOT_APPLIED)).verdict == NOT_APPLIED
    assert Run(NF4, device, load(outcome=CRASHED), [Comparison("memory", "ok")]).verdict == CRASHED
    assert Run(NF4, device, load()).verdict == "measured"
    assert Run(NF4, device, outcome=SKIP).verdict == "skipped"
    assert Run(NF4, device, outcome=ERROR).verdict == "machine"
    improved, whole = Comparison("memory", "improved"), Comparison("time", "incomparable", whole=True)
    assert Run(NF4, device, load(), [improved, whole]).verdict == "incomparable"
    assert Run(NF4, device, load(), [improved, Comparison("time", "incomparable")]).verdict == "improved"


def test_what_two_processes_said_of_a_load_is_one_run_and_the_worst_counts() -> None:
    fine = Run(NF4, "", load(), [Comparison("memory", "ok"), Comparison("work", "changed")], ["a"], messages=["slow"])
    bad = Run(NF4, "cpu-x86_64", load(), [Comparison("memory", "regressed"), Comparison("work", "ok")], ["b"], FAIL)
    bad.messages, bad.baseline, bad.recorded = ["slow", "over"], "baselines/x.json", ["time"]
    bad.comparisons.append(Comparison("time", "ok"))
    fine.merge(bad)
    assert (fine.outcome, fine.verdict, fine.baseline, fine.device_key) == (
        FAIL,
        "regressed",
        "baselines/x.json",
        "cpu-x86_64",
    )
    assert {item.section: item.verdict for item in fine.comparisons} == {
        "memory": "regressed",
        "work": "changed",
        "time": "ok",
    }
    assert (fine.nodeids, fine.messages, fine.recorded) == (["a", "b"], ["slow", "over"], ["time"])
    crashed = Run(NF4, "", load(outcome=CRASHED), nodeids=["c"], outcome=ERROR)
    fine.merge(crashed)
    assert (fine.outcome, fine.verdict) == (ERROR, CRASHED)
    fine.merge(Run(NF4, "", load()))
    assert (fine.outcome, fine.verdict) == (ERROR, CRASHED)


def test_a_load_that_another_process_only_skipped_passes_and_one_that_no_test_has_used_says_nothing() -> None:
    skipped = Run(NF4, "", nodeids=["a"], outcome=SKIP)
    skipped.merge(Run(NF4, "", load()))
    assert skipped.outcome == SKIP
    skipped.merge(Run(NF4, "", load(), nodeids=["b"]))
    assert (skipped.outcome, skipped.verdict) == (PASS, "measured")


def checked(section: str, verdict: str, *names: str, **more: Any) -> Comparison:
    return Comparison(section, verdict, metrics=tuple(MetricVerdict(name, verdict) for name in names), **more)


def test_a_later_check_of_other_metrics_does_not_hide_an_earlier_one() -> None:
    run = Run(NF4, "cpu-x86_64", load())
    run.add([checked("memory", "regressed", "host.weights", because=("2 x Linear",))])
    run.add([checked("memory", "ok", "weights.logical"), checked("time", "ok", "load")])
    memory, times = run.comparisons
    assert run.verdict == memory.verdict == "regressed"
    assert [(item.name, item.verdict) for item in memory.metrics] == [
        ("host.weights", "regressed"),
        ("weights.logical", "ok"),
    ]
    assert memory.because == ("2 x Linear",)
    assert times.verdict == "ok"


def test_of_one_metric_checked_twice_the_worse_verdict_stays() -> None:
    for first, second in (("ok", "changed"), ("changed", "ok")):
        run = Run(NF4, "cpu-x86_64", load())
        run.add([checked("memory", first, "manifest")])
        run.add([checked("memory", second, "manifest")])
        (memory,) = run.comparisons
        assert [memory.verdict, *(item.verdict for item in memory.metrics)] == ["changed", "changed"]


def test_a_check_without_a_baseline_stays_the_worse_one_too() -> None:
    run = Run(NF4, "cpu-x86_64", load())
    run.add([Comparison("memory", "incomparable", whole=True, reason="different spec")])
    run.add([checked("memory", "improved", "host.peak")])
    assert (run.verdict, run.comparisons[0].reason) == ("incomparable", "different spec")


def mixed(*verdicts: str) -> Comparison:
    metrics = [MetricVerdict(f"m{number}", verdict) for number, verdict in enumerate(verdicts)]
    return Comparison("memory", worst(verdicts), metrics=tuple(metrics))


@pytest.mark.parametrize(
    ("verdicts", "mode", "status", "writes", "failing"),
    [
        (("missing", "regressed"), {"record_missing": True}, FAIL, True, ("regressed", ["m1"])),
        (("missing", "improved"), {"record_missing": True}, PASS, True, None),
        (("missing", "improved"), {"record_missing": True, "strict": True}, FAIL, True, ("improved", ["m1"])),
        (("unavailable", "regressed"), {"update": True, "strict": True}, FAIL, True, ("unavailable", ["m0"])),
        (("ok", "missing"), {}, FAIL, False, ("missing", ["m1"])),
        (("ok", "ok"), {"strict": True}, PASS, False, None),
    ],
)
def test_each_metric_has_its_own_outcome(
    verdicts: tuple[str, ...], mode: dict[str, Any], status: str, writes: bool, failing: tuple[Any, ...] | None
) -> None:
    comparison = mixed(*verdicts)
    found = comparison.outcome(**mode)
    assert (found.status, found.writes) == (status, writes)
    part = comparison.failing(**mode)
    assert (part and (part.verdict, [item.name for item in part.metrics])) == failing


def test_what_explains_a_figure_that_passes_is_left_out() -> None:
    explained = dataclasses.replace(mixed("missing", "improved"), because=("2 x Linear",))
    missing, improved = explained.failing(), explained.failing(strict=True)
    assert missing is not None
    assert missing.because == ()
    assert improved is not None
    assert improved.because == ("2 x Linear",)


def test_a_run_whose_verdict_was_written_says_so() -> None:
    device = "cpu-x86_64"
    missing = Comparison("memory", "missing", whole=True)
    assert Run(NF4, device, load(), [missing], recorded=["host.weights"]).verdict == "recorded"
    assert Run(NF4, device, load(), [missing]).verdict == "missing"
    assert Run(NF4, device, load(), [mixed("ok", "improved")], accepted=["m1"]).verdict == "accepted"
    # Of what else was written the verdict says nothing.
    assert Run(NF4, device, load(), [mixed("missing", "regressed")], recorded=["m0"]).verdict == "regressed"
    assert Run(NF4, device, load(outcome=CRASHED), [missing], recorded=["host.weights"]).verdict == CRASHED


def test_a_limit_that_was_exceeded_is_the_verdict_unless_a_comparison_is_worse() -> None:
    run = Run(NF4, "cpu", load(), over_limits=["memory ceiling exceeded"])
    assert run.verdict == "over_limit"
    run.comparisons = [Comparison("memory", "improved")]
    assert run.verdict == "over_limit"
    run.comparisons = [Comparison("memory", "regressed")]
    assert run.verdict == "regressed"
    other = Run(NF4, "cpu", load(), over_limits=["latency budget exceeded"])
    run.merge(other)
    assert run.over_limits == ["memory ceiling exceeded", "latency budget exceeded"]
