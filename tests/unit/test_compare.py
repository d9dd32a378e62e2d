"""A load against its baseline: which verdict, for what reason, in which words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
from sample_loads import ENVIRONMENT, GIB, HOST, METRICS, MIB, NF4, baseline_of, linears, load, manifest, numbers

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.manifest import diff
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.baselines.timings import timings
from pytest_llmload.core.results import NOT_APPLIED, LoadResult, ManifestRow, Numbers
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.units import Tolerance
from pytest_llmload.core.verdicts import Comparison

PLAIN = "nf4 absmax=float32 block=64 compute=bf16"
NESTED = "nf4 absmax=uint8 nested block=64 compute=bf16"


@pytest.fixture
def baseline() -> Baseline:
    return baseline_of(None, [load(), load()], update=True)


def environment(**changes: str) -> dict[str, str]:
    return {**ENVIRONMENT, **changes}


def verdicts(comparison: Comparison) -> dict[str, str]:
    """Every verdict that is not ok."""
    return {item.name: item.verdict for item in comparison.metrics if item.verdict != "ok"}


def texts(old: Sequence[ManifestRow], new: Sequence[ManifestRow]) -> list[str]:
    return [change.text for change in diff(old, new)]


# --- identity --------------------------------------------------------------------------------------------------------


def test_the_same_load_is_ok_in_memory_and_work(baseline: Baseline) -> None:
    comparison = compare(baseline, load())
    assert (comparison.verdict, comparison.whole, verdicts(comparison)) == ("ok", False, {})
    assert {"gpu.settled", "manifest", "numbers"} <= {item.name for item in comparison.metrics}


def test_no_baseline_is_missing_as_a_whole() -> None:
    comparison = compare(None, load())
    assert (comparison.verdict, comparison.whole) == ("missing", True)


def test_a_load_that_failed_cannot_pass_a_comparison(baseline: Baseline) -> None:
    with pytest.raises(ValueError, match="not_applied"):
        compare(baseline, load(outcome=NOT_APPLIED))


def test_another_shape_names_both_and_what_differs(baseline: Baseline) -> None:
    other = load(digests={"shape": "b0b" * 20, "weights": "3e1f" * 16}, manifest=manifest(per_module=30 * MIB))
    comparison = compare(baseline, other)
    assert (comparison.verdict, comparison.whole) == ("incomparable", True)
    assert comparison.reason == "different model shape: 5ha9e5ha9e5h in the baseline and b0bb0bb0bb0b now"
    assert comparison.manifest[0].text.startswith("160 x Linear4bit: 40.00 MiB -> 30.00 MiB each")


def test_another_spec_names_the_fields(baseline: Baseline) -> None:
    comparison = compare(baseline, load(dataclasses.replace(NF4, double_quant=False, attn="eager")))
    assert (comparison.verdict, comparison.whole) == ("incomparable", True)
    assert comparison.reason == (
        'different spec: attn is null in the baseline and "eager" now; '
        "double_quant is true in the baseline and false now"
    )


def test_checks_and_the_models_place_do_not_make_another_spec(baseline: Baseline) -> None:
    moved = dataclasses.replace(NF4, model="/data/polyglot", dense_ok=("*.experts.*",))
    assert compare(baseline, load(moved)).verdict == "ok"


def test_an_adapter_in_another_place_is_the_same_spec() -> None:
    there = dataclasses.replace(NF4, adapter="/home/a/run/adapter")
    here = dataclasses.replace(NF4, adapter="/ci/build/adapter")
    assert compare(baseline_of(None, [load(there)], update=True), load(here)).verdict == "ok"


def test_a_load_of_another_workload_is_not_compared(baseline: Baseline) -> None:
    comparison = compare(baseline, load(dataclasses.replace(NF4, workload=Workload(4, 2048, 64))))
    assert comparison.reason == "different workload: 1x128+32 in the baseline and 4x2048+64 now"


def test_a_fine_tune_stays_gated_but_for_its_numbers(baseline: Baseline) -> None:
    tuned = load(digests={"shape": baseline.shape, "weights": "cafe" * 16}, metrics={"gpu.settled": 8 * GIB})
    comparison = compare(baseline, tuned)
    assert comparison.verdict == "regressed"
    assert verdicts(comparison) == {"gpu.settled": "regressed", "numbers": "incomparable"}
    assert "weights 3e1f3e1f3e1f -> cafecafecafe" in comparison.changed


def test_a_section_that_was_never_recorded_is_missing(baseline: Baseline) -> None:
    only_time = baseline_of(None, [load()], update=True, sections=["time"])
    comparison = compare(only_time, load())
    assert (comparison.verdict, comparison.whole) == ("missing", True)
    assert comparison.reason == "nothing is recorded for memory"


def test_a_section_that_neither_side_measured_is_unavailable(baseline: Baseline) -> None:
    assert compare(baseline, load(), section="work").verdict == "unavailable"


# --- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "value", "verdict"),
    [
        ("gpu.settled", METRICS["gpu.settled"] + 2 * MIB, "ok"),
        ("gpu.settled", METRICS["gpu.settled"] + 2 * MIB + 1, "regressed"),
        ("gpu.settled", METRICS["gpu.settled"] - 2 * MIB - 1, "improved"),
        ("gpu.weights", METRICS["gpu.weights"] + 1, "regressed"),
        ("gpu.weights", METRICS["gpu.weights"] - 1, "improved"),
        ("host.weights", 1, "regressed"),
        ("gpu.load_allocations", METRICS["gpu.load_allocations"] + 1, "regressed"),
        ("gpu.other_tensors", 512, "regressed"),
        ("gpu.load_peak", METRICS["gpu.load_peak"] * 1.009, "ok"),
        ("gpu.load_peak", METRICS["gpu.load_peak"] * 1.011, "regressed"),
        ("gpu.reserved_peak", METRICS["gpu.reserved_peak"] * 1.04, "ok"),
        ("gpu.process", METRICS["gpu.process"] + 65 * MIB, "regressed"),
        ("host.peak", METRICS["host.peak"] * 1.04, "ok"),
        ("host.peak", METRICS["host.peak"] * 1.06, "regressed"),
        # Reported, never gated.
        ("gpu.forward_peak", METRICS["gpu.forward_peak"] * 2, "ok"),
        ("host.file", METRICS["host.file"] * 9, "ok"),
    ],
)
def test_each_class_has_its_tolerance(baseline: Baseline, metric: str, value: float, verdict: str) -> None:
    assert compare(baseline, load(metrics={metric: value})).verdict == verdict


def test_tolerances_are_replaced_by_name_and_for_each_gpu() -> None:
    two = {"gpu.1.settled": 7 * GIB, "gpu.0.settled": 7 * GIB, "gpu.settled": 14 * GIB}
    spec = dataclasses.replace(NF4, gpu_count=2)
    recorded = baseline_of(None, [load(spec, metrics=two)], update=True)
    shifted = load(spec, metrics={**two, "gpu.0.settled": 6 * GIB, "gpu.1.settled": 8 * GIB})
    # The sum is the same, each GPU's is not.
    assert verdicts(compare(recorded, shifted)) == {"gpu.0.settled": "improved", "gpu.1.settled": "regressed"}
    loose = {"gpu.settled": Tolerance(relative=0.2)}
    assert compare(recorded, shifted, tolerances=loose).verdict == "ok"
    one = {**loose, "gpu.1.settled": Tolerance(absolute=MIB)}
    assert verdicts(compare(recorded, shifted, tolerances=one)) == {"gpu.1.settled": "regressed"}


def test_exact_is_loosened_by_its_name_only(baseline: Baseline) -> None:
    heavier = load(metrics={"gpu.weights": METRICS["gpu.weights"] + 512})
    assert compare(baseline, heavier, tolerances={"gpu.settled": Tolerance(relative=1)}).verdict == "regressed"
    assert compare(baseline, heavier, tolerances={"gpu.weights": Tolerance(absolute=512)}).verdict == "ok"


def test_of_one_gpu_the_sum_says_all(baseline: Baseline) -> None:
    assert "gpu.settled" in baseline.memory
    assert "gpu.0.settled" not in baseline.memory
    assert not [item.name for item in compare(baseline, load()).metrics if item.name.startswith("gpu.0.")]


def test_chosen_metrics_are_the_only_ones(baseline: Baseline) -> None:
    moved = load(metrics={"gpu.settled": 8 * GIB}, manifest=manifest(PLAIN))
    assert compare(baseline, moved, metrics=["gpu.load_peak"]).verdict == "ok"
    assert compare(baseline, moved, metrics=["gpu.load_peak", "gpu.settled"]).verdict == "regressed"
    assert compare(baseline, moved, metrics=["manifest"]).verdict == "changed"
    assert compare(baseline, moved, metrics=["host.anon_peak"]).metrics[0].verdict == "unavailable"


def test_what_no_load_measures_is_unavailable_and_not_missing_though_nothing_is_recorded(baseline: Baseline) -> None:
    on_a_cpu = load(metrics={"gpu.settled": None, "gpu.0.settled": None})
    for recorded in (None, dataclasses.replace(baseline, memory={}, manifest=())):
        assert compare(recorded, on_a_cpu, metrics=["gpu.settled"]).verdict == "unavailable"
        assert compare(recorded, load(), metrics=["gpu.settled"]).verdict == "missing"


def test_wrong_names_are_errors(baseline: Baseline) -> None:
    with pytest.raises(KeyError, match=r"unknown metric 'gpu.setled'; known: gpu.weights"):
        compare(baseline, load(), metrics=["gpu.setled"])
    with pytest.raises(KeyError, match=r"unknown metric 'gpu.setled'"):
        compare(baseline, load(), tolerances={"gpu.setled": Tolerance()})
    with pytest.raises(ValueError, match="'load' is a figure of the time baseline, not of the memory baseline"):
        compare(baseline, load(), metrics=["load"])


def test_not_measured_now_is_unavailable_with_its_reason(baseline: Baseline) -> None:
    hidden = load(metrics={"gpu.process": None}, unavailable={"gpu.process": "NVML lists processes of the host only"})
    comparison = compare(baseline, hidden)
    assert comparison.verdict == "unavailable"
    assert comparison.having("unavailable")[0].reason == "NVML lists processes of the host only"


def test_not_in_the_baseline_is_missing_unless_it_never_gates() -> None:
    without = baseline_of(None, [load(metrics={"gpu.process": None, "host.file": None})], update=True)
    comparison = compare(without, load(metrics={"host.file": None}))
    assert (comparison.verdict, comparison.whole) == ("missing", False)
    assert verdicts(comparison) == {"gpu.process": "missing"}
    comparison = compare(without, load(metrics={"gpu.process": None}))
    assert (comparison.verdict, verdicts(comparison)) == ("ok", {"host.file": "missing"})


def test_a_metric_that_this_version_does_not_know(baseline: Baseline) -> None:
    newer = dataclasses.replace(baseline, memory={**baseline.memory, "gpu.fragments": 3})
    comparison = compare(newer, load())
    assert comparison.having("unavailable")[0].name == "gpu.fragments"


def test_a_different_environment_concerns_the_metrics_that_depend_on_them(baseline: Baseline) -> None:
    driver = compare(baseline, load(metrics={"gpu.process": 20 * GIB}, environment=environment(driver="570.1")))
    assert (driver.verdict, driver.whole) == ("incomparable", False)
    assert verdicts(driver) == {"gpu.process": "incomparable", "gpu.context": "incomparable"}
    assert driver.having("incomparable")[0].reason == "driver 560.28.03 -> 570.1"
    # What does not depend on the driver is gated all the same.
    both = compare(baseline, load(metrics={"gpu.settled": 8 * GIB}, environment=environment(driver="570.1")))
    assert both.verdict == "regressed"


def test_a_new_metric_in_a_different_environment_is_not_missing_but_incomparable() -> None:
    without = baseline_of(None, [load(metrics={"gpu.process": None})], update=True)
    other = compare(without, load(environment=environment(driver="570.1")))
    assert verdicts(other)["gpu.process"] == "incomparable"


def test_only_what_a_baseline_keeps_is_compared_as_environment(baseline: Baseline) -> None:
    comparison = compare(baseline, load(environment=environment(bitsandbytes="0.50.2", user="b", python="3.12.1")))
    assert comparison.changed == ("bitsandbytes 0.50.1 -> 0.50.2", "python 3.11.7 -> 3.12.1")


# --- modules ---------------------------------------------------------------------------------------------------------


def test_dropped_double_quant_is_named(baseline: Baseline) -> None:
    comparison = compare(baseline, load(manifest=manifest(PLAIN, 43 * MIB)))
    assert comparison.verdict == "changed"
    assert [change.text for change in comparison.manifest] == [
        "160 x Linear4bit: double quant dropped, absmax uint8 -> float32 (+480.00 MiB)"
    ]
    assert (comparison.manifest[0].modules, comparison.manifest[0].bytes) == (160, 480 * MIB)


def test_modules_gate_even_where_every_total_is_in_bounds(baseline: Baseline) -> None:
    rows = manifest()
    rows[0] = dataclasses.replace(rows[0], dtype="float32")
    assert compare(baseline, load(manifest=rows)).verdict == "changed"


def test_fewer_bytes_are_still_a_change(baseline: Baseline) -> None:
    assert compare(baseline, load(manifest=manifest(per_module=30 * MIB))).verdict == "changed"


LAYERS = ["self_attn.q_proj", "mlp.up_proj", "input_layernorm"]


def llama(indices: str = "0-39", device: str = "cuda:0") -> list[ManifestRow]:
    count = sum(
        int(last or first) - int(first) + 1 for first, _, last in (p.partition("-") for p in indices.split(","))
    )
    return [
        ManifestRow(
            f"model.layers.*.{name}",
            indices,
            "LlamaRMSNorm" if "norm" in name else "Linear4bit",
            "bfloat16" if "norm" in name else "uint8",
            device,
            "" if "norm" in name else NESTED,
            count,
            count * 4 * MIB,
        )
        for name in LAYERS
    ]


def test_layers_that_moved_are_named_by_their_place() -> None:
    assert texts(llama(), [*llama("0-19"), *llama("20-39", "cpu")]) == ["model.layers.20-39.*: cuda:0 -> cpu"]
    assert texts(llama(), [*llama("1-39"), *llama("0", "disk")]) == ["model.layers.0.*: cuda:0 -> disk"]
    assert texts(llama(), llama(device="cpu")) == ["all 120 modules: cuda:0 -> cpu"]


def test_parts_of_layers_that_moved_are_not_called_whole_layers() -> None:
    stayed, *moved = llama()
    rest = [dataclasses.replace(row, indices="0-37", count=38, bytes=38 * 4 * MIB) for row in moved]
    there = [dataclasses.replace(row, indices="38-39", count=2, bytes=8 * MIB, device="cpu") for row in moved]
    assert texts(llama(), [stayed, *rest, *there]) == ["4 modules in model.layers.38-39: cuda:0 -> cpu"]


def test_modules_outside_the_layers_that_moved_are_named() -> None:
    extra = [ManifestRow(name, "", "Linear", "bfloat16", "cuda:0", "", 1, MIB) for name in ("lm_head", "model.norm")]
    moved = [dataclasses.replace(row, device="cpu") for row in extra]
    assert texts([*llama(), *extra], [*llama("0-38"), *llama("39", "cpu"), *moved]) == [
        "model.layers.39.*: cuda:0 -> cpu",
        "lm_head, model.norm: cuda:0 -> cpu",
    ]


def test_one_module_that_is_not_quantised_any_more() -> None:
    rows = llama()
    rest = dataclasses.replace(rows[1], indices="0-2,4-39", count=39, bytes=39 * 4 * MIB)
    dense = ManifestRow("model.layers.*.mlp.up_proj", "3", "Linear", "bfloat16", "cuda:0", "", 1, 16 * MIB)
    assert texts(rows, [rows[0], rest, dense, rows[2]]) == [
        "model.layers.3.mlp.up_proj: quantised nf4 -> dense bfloat16 (+12.00 MiB)"
    ]


def test_some_layers_of_one_kind_of_module_and_of_several() -> None:
    rows = llama()
    dense = [
        dataclasses.replace(row, cls="Linear", dtype="bfloat16", quant="", indices="0-1", count=2) for row in rows[:2]
    ]
    rest = [dataclasses.replace(row, indices="2-39", count=38, bytes=38 * 4 * MIB) for row in rows[:2]]
    dense = [dataclasses.replace(row, bytes=2 * 16 * MIB) for row in dense]
    assert texts(rows, [*rest, *dense, rows[2]]) == [
        "4 x Linear4bit in model.layers.0-1: quantised nf4 -> dense bfloat16 (+48.00 MiB)"
    ]
    assert texts(rows, [rest[0], dense[0], rows[1], rows[2]]) == [
        "model.layers.0-1.self_attn.q_proj: quantised nf4 -> dense bfloat16 (+24.00 MiB)"
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quant": "fp4 absmax=uint8 nested block=64 compute=bf16"}, "quantised nf4 -> fp4"),
        ({"quant": "nf4 absmax=uint8 nested block=128 compute=bf16"}, "block 64 -> 128"),
        ({"quant": "nf4 absmax=uint8 nested block=64"}, "compute bf16 -> none"),
        ({"cls": "MyLinear4bit"}, "now MyLinear4bit"),
        ({"dtype": "int8", "device": "cpu"}, "uint8 -> int8, cuda:0 -> cpu"),
        ({"bytes": 40 * 5 * MIB}, "4.00 MiB -> 5.00 MiB each (+40.00 MiB)"),
    ],
)
def test_what_can_change_in_a_module(change: dict[str, Any], text: str) -> None:
    row = llama()[1]
    assert texts([row, llama()[0]], [dataclasses.replace(row, **change), llama()[0]])[0].endswith(
        f"mlp.up_proj: {text}"
    )


def test_modules_that_came_and_went() -> None:
    shared = ManifestRow("model.mtp", "", "MtpHead", "bfloat16", "cuda:0", "", 1, 8 * MIB)
    assert texts(llama(), [*llama(), shared]) == ["model.mtp: added, dense bfloat16 on cuda:0 (+8.00 MiB)"]
    assert texts([*llama(), shared], llama()) == ["model.mtp: removed, was dense bfloat16 on cuda:0 (-8.00 MiB)"]


def test_the_most_bytes_come_first_and_row_splits_are_no_difference() -> None:
    assert texts(llama(), [*llama("0-7"), *llama("8-39")]) == []
    small = ManifestRow("a", "", "Linear", "bfloat16", "cuda:0", "", 1, MIB)
    large = dataclasses.replace(small, module="b", bytes=9 * MIB, dtype="float32")
    assert [text[0] for text in texts([], [small, large])] == ["b", "a"]


def test_a_manifest_that_was_not_taken_is_not_a_model_without_modules(baseline: Baseline) -> None:
    comparison = compare(baseline, load(manifest=[], unavailable={"manifest": "the model has no modules"}))
    assert comparison.verdict == "unavailable"
    assert comparison.manifest == ()


# --- numbers ---------------------------------------------------------------------------------------------------------


def shifted(factor: float = 1.0, **changes: Any) -> Numbers:
    base = numbers()
    return dataclasses.replace(base, logits=[value * factor for value in base.logits], **changes)


def numbers_verdict(baseline: Baseline, new: Numbers | None, **changes: Any) -> tuple[str, str]:
    comparison = compare(baseline, load(numbers=new, **changes))
    item = next(item for item in comparison.metrics if item.name == "numbers")
    return item.verdict, item.reason


def test_moved_logits_are_changed(baseline: Baseline) -> None:
    assert numbers_verdict(baseline, shifted(1.04))[0] == "ok"
    verdict, reason = numbers_verdict(baseline, shifted(1.06))
    assert (verdict, reason) == ("changed", "relative logits error 0.06 (tolerance 0.05)")
    assert compare(baseline, load(numbers=shifted(1.06))).verdict == "changed"


def test_the_tolerance_follows_the_models_types() -> None:
    for dtype, quant, allowed in (
        ("float32", "", 1e-4),
        ("float16", "", 1e-2),
        ("bfloat16", "", 5e-2),
        ("float32+bfloat16", "", 5e-2),
        ("uint8", "nf4 absmax=float32 block=64 compute=float16", 5e-2),
        ("float8_e4m3fn", "", 5e-2),
    ):
        rows = [
            ManifestRow("norm", "", "LayerNorm", "float16" if quant else dtype, "cpu", "", 1, MIB),
            ManifestRow("lm_head", "", "Linear", dtype, "cpu", quant, 1, MIB),
        ]
        recorded = baseline_of(None, [load(manifest=rows)], update=True)
        assert numbers_verdict(recorded, shifted(1 + 0.9 * allowed), manifest=rows)[0] == "ok"
        assert numbers_verdict(recorded, shifted(1 + 1.2 * allowed), manifest=rows)[0] == "changed"


def test_moved_buffers_are_named_first(baseline: Baseline) -> None:
    wrong = shifted(1.5, buffers={"gpt_neox.rotary_emb.inv_freq": [4.21, 1.2345678]})
    assert numbers_verdict(baseline, wrong)[1].startswith(
        "gpt_neox.rotary_emb.inv_freq values changed, relative logits"
    )
    only = shifted(buffers={"gpt_neox.rotary_emb.inv_freq": [4.1731934, 1.2355678]})
    assert numbers_verdict(baseline, only) == ("changed", "gpt_neox.rotary_emb.inv_freq values changed")


def test_a_buffer_that_sums_to_nothing_is_judged_by_its_norm() -> None:
    centred = shifted(buffers={"mask": [1e-9, 3.0]})
    recorded = baseline_of(None, [load(numbers=centred)], update=True)
    assert numbers_verdict(recorded, shifted(buffers={"mask": [-4e-9, 3.0]}))[0] == "ok"


def test_log_sum_exp_and_margin_are_looked_at(baseline: Baseline) -> None:
    base = numbers()
    lse = shifted(logsumexp=[value + 0.1 for value in base.logsumexp])
    assert "relative log-sum-exp error" in numbers_verdict(baseline, lse)[1]
    margin = shifted(margin=[value + 0.2 for value in base.margin])
    assert "relative margin error" in numbers_verdict(baseline, margin)[1]


def _small() -> Numbers:
    """Logits of a model that was never trained: the log-sum-exp is log(vocabulary), and the logits are next to none."""
    return Numbers(
        logits=[0.012345678, -0.0087654321], logsumexp=[10.3734918, 10.3735193], margin=[0.0012345678, 0.0023456789]
    )


FP32 = [ManifestRow("lm_head", "", "Linear", "float32", "cpu", "", 1, MIB)]


def test_small_logits_are_stored_with_the_digits_that_they_are_judged_by() -> None:
    recorded = baseline_of(None, [load(numbers=_small(), manifest=FP32)], update=True)
    assert recorded.numbers == _small()
    assert numbers_verdict(recorded, _small(), manifest=FP32)[0] == "ok"
    moved = dataclasses.replace(_small(), logsumexp=[value + 3e-6 for value in _small().logsumexp])
    assert numbers_verdict(recorded, moved, manifest=FP32)[0] == "changed"


def test_a_file_with_fewer_digits_is_given_its_rounding() -> None:
    recorded = baseline_of(None, [load(numbers=_small(), manifest=FP32)], update=True)
    old = Numbers(logits=[0.0123457, -0.00876543], logsumexp=[10.3735, 10.3735], margin=[0.00123457, 0.00234568])
    recorded = dataclasses.replace(recorded, numbers=old)
    assert numbers_verdict(recorded, _small(), manifest=FP32)[0] == "ok"
    again = record(recorded, [load(numbers=_small(), manifest=FP32)], update=True)
    assert again.baseline == recorded
    moved = dataclasses.replace(_small(), logsumexp=[value + 1e-4 for value in _small().logsumexp])
    assert numbers_verdict(recorded, moved, manifest=FP32)[0] == "changed"


def test_logits_that_are_not_finite(baseline: Baseline) -> None:
    assert numbers_verdict(baseline, shifted(math.nan)) == ("changed", "the logits are not finite")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"digests": {"shape": "5ha9e" * 12, "weights": "0" * 64}}, "different weights: 3e1f3e1f3e1f -> 000000000000"),
        ({"environment": environment(torch="2.14.0+cu128")}, "torch 2.13 -> 2.14"),
    ],
)
def test_numbers_of_other_weights_or_another_torch_are_not_compared(
    baseline: Baseline, changes: dict[str, Any], reason: str
) -> None:
    assert numbers_verdict(baseline, shifted(9.0), **changes) == ("incomparable", reason)


def test_a_patch_release_of_torch_is_the_same_torch(baseline: Baseline) -> None:
    assert numbers_verdict(baseline, shifted(9.0), environment=environment(torch="2.13.1+cu130"))[0] == "changed"


def test_other_positions_are_not_compared(baseline: Baseline) -> None:
    verdict, reason = numbers_verdict(baseline, Numbers(logits=[1.0] * 8))
    assert (verdict, reason) == ("incomparable", "the baseline has 16 values of logits, but this load has 8")


def test_numbers_that_are_not_there(baseline: Baseline) -> None:
    assert numbers_verdict(baseline, Numbers(), unavailable={"numbers": "no forward"}) == ("unavailable", "no forward")
    without = dataclasses.replace(baseline, numbers=Numbers())
    assert numbers_verdict(without, numbers())[0] == "missing"
    assert numbers_verdict(baseline, shifted(9.0))[0] == "changed"
    assert (
        compare(baseline, load(numbers=shifted(1.2)), tolerances={"numbers": Tolerance(absolute=0.3)}).verdict == "ok"
    )


# --- reasons ---------------------------------------------------------------------------------------------------------


def test_what_explains_a_figure_that_moved(baseline: Baseline) -> None:
    metrics = {
        "gpu.settled": METRICS["gpu.settled"] + 480 * MIB,
        "gpu.load_allocations": METRICS["gpu.load_allocations"] + 160,
        "gpu.load_allocated": METRICS["gpu.load_allocated"] + 480 * MIB,
        "gpu.other_tensors": 512,
    }
    comparison = compare(baseline, load(metrics=metrics, manifest=manifest(PLAIN, 43 * MIB)))
    assert comparison.verdict == "regressed"
    assert comparison.because == (
        "160 x Linear4bit: double quant dropped, absmax uint8 -> float32 (+480.00 MiB)",
        "gpu.load_allocations +160",
        "gpu.load_allocated +480.00 MiB",
        "gpu.other_tensors +512 B",
    )


def test_loading_work_is_a_reason_where_it_is_not_comparable(baseline: Baseline) -> None:
    metrics = {"gpu.load_peak": 10 * GIB, "gpu.load_allocations": METRICS["gpu.load_allocations"] + 1}
    comparison = compare(baseline, load(metrics=metrics, environment=environment(transformers="5.24.0")))
    assert verdicts(comparison) == {
        "gpu.load_peak": "regressed",
        "gpu.load_allocations": "incomparable",
        "gpu.load_allocated": "incomparable",
    }
    assert comparison.because == ("gpu.load_allocations +1",)


def test_a_copy_that_no_peak_shows(baseline: Baseline) -> None:
    metrics = {
        "gpu.load_allocations": METRICS["gpu.load_allocations"] + 1,
        "gpu.load_allocated": METRICS["gpu.load_allocated"] + 256 * MIB,
    }
    comparison = compare(baseline, load(metrics=metrics))
    assert comparison.verdict == "regressed"
    assert comparison.because == ("the load makes copies that it frees again: gpu.settled is as recorded",)


def test_a_memory_map_that_is_switched_off_is_named(baseline: Baseline) -> None:
    grown, held = {"host.settled": METRICS["host.settled"] + 33 * MIB}, METRICS["host.file"]
    told = compare(baseline, load(metrics={**grown, "host.file": held - 33 * MIB})).because
    assert told == ("host.file -33.00 MiB: what was mapped from files is now read into memory",)
    for file in (held, held - 8 * MIB, held + 33 * MIB):
        assert "mapped" not in str(compare(baseline, load(metrics={**grown, "host.file": file})).because)


def test_weights_that_are_views_of_larger_storages_are_the_reason(baseline: Baseline) -> None:
    note = "weights keep 8.00 MiB alive beyond their elements: they are views of larger storages, most of all norm"
    kept = load(metrics={"gpu.weights": METRICS["gpu.weights"] + 8 * MIB})
    kept.notes.append(note)
    assert compare(baseline, kept).because == (note,)
    other = load(metrics={"gpu.settled": 8 * GIB})
    other.notes.append(note)
    assert note not in compare(baseline, other).because


def test_what_nothing_explains_is_said(baseline: Baseline) -> None:
    comparison = compare(baseline, load(metrics={"gpu.settled": 8 * GIB}))
    assert comparison.because[0].startswith("nothing recorded explains it")
    updated = compare(baseline, load(metrics={"gpu.settled": 8 * GIB}, environment=environment(torch="2.13.1")))
    assert updated.because == ()


def test_memory_that_each_call_leaves_is_a_reason_of_its_own(baseline: Baseline) -> None:
    still = dataclasses.replace(baseline, memory={**baseline.memory, "host.growth": 0})
    (reason,) = compare(still, load(metrics={"host.growth": 8 << 20})).because
    assert reason.startswith("each call of the model leaves memory behind")


def test_what_did_not_move_needs_no_reason(baseline: Baseline) -> None:
    assert compare(baseline, load(manifest=manifest(PLAIN))).because == ()


# --- time ------------------------------------------------------------------------------------------------------------


def test_times_on_the_same_host_are_reported(baseline: Baseline) -> None:
    comparison = compare(baseline, load(samples={"load": [30.0, 31.0, 29.0]}), section="time")
    assert comparison.verdict == "inconclusive"
    first = comparison.metrics[0]
    assert (first.name, first.baseline, first.current) == ("load", 12.31, 30.0)
    assert first.reason == "too few processes to tell"


def test_times_of_another_host_are_not_compared(baseline: Baseline) -> None:
    comparison = compare(baseline, load(environment=environment(host="nvidia-h100/other")), section="time")
    assert (comparison.verdict, comparison.whole) == ("incomparable", False)
    assert comparison.metrics[0].reason == f"recorded on {HOST}; this host is nvidia-h100/other"


def test_a_cold_load_is_not_compared_with_a_warm_one(baseline: Baseline) -> None:
    comparison = compare(baseline, load(environment=environment(page_cache="cold")), section="time")
    assert verdicts(comparison) == {"load": "incomparable", "ttft": "inconclusive", "per_token": "inconclusive"}
    assert comparison.metrics[0].reason == "page_cache warm -> cold"


def test_times_that_were_never_recorded_are_missing(baseline: Baseline) -> None:
    comparison = compare(dataclasses.replace(baseline, time={}), load(), section="time")
    assert (comparison.verdict, comparison.whole) == ("missing", True)
    only = compare(baseline, load(metrics={"ttft": None, "per_token": None}, samples={}), section="time")
    assert verdicts(only) == {"load": "inconclusive", "ttft": "unavailable", "per_token": "unavailable"}


def test_the_fixture_rows_are_what_the_failure_text_says() -> None:
    assert sum(row.count for row in linears(NESTED, MIB)) == 160


# --- times over processes, and the work behind them ------------------------------------------------------------------

WORK = {"token.ops": 2432, "token.kernels": 695, "token.gpu_time": 0.00225, "prefill.ops": 2691}


def processes(factor: float = 1.0, **changes: Any) -> list[LoadResult]:
    """Six processes whose medians scatter by a percent."""
    scatter = (1.0, 1.01, 0.99, 1.005, 0.995, 1.0)
    return [
        load(
            samples={"per_token": [0.025 * factor * part] * 3, "ttft": [0.04 * part] * 3, "load": [12.0 * part]},
            **changes,
        )
        for part in scatter
    ]


@pytest.fixture
def timed() -> Baseline:
    """A baseline of six processes that knows the work."""
    results = processes(metrics=WORK)
    return baseline_of(None, results, update=True)


def test_a_time_that_moved_is_explained_by_the_work_that_did(timed: Baseline) -> None:
    now = {**WORK, "token.ops": 2500, "token.kernels": 763}
    result = load(metrics=now)
    comparison = compare(timed, result, section="time", times=timings(processes(1.2)))
    assert verdicts(comparison) == {"per_token": "regressed"}
    assert comparison.because == ("token.ops 2,432 -> 2,500 (+68)", "token.kernels 695 -> 763 (+68)")
    assert compare(timed, result, section="work").verdict == "regressed"


def test_a_time_that_no_work_explains_says_so(timed: Baseline) -> None:
    comparison = compare(timed, load(metrics=WORK), section="time", times=timings(processes(1.2)))
    assert comparison.because == ("no counted work explains it: operators, kernels and library versions are the same",)
    tolerated = compare(
        timed,
        load(metrics=WORK),
        section="time",
        times=timings(processes(1.2)),
        tolerances={"per_token": Tolerance(relative=0.5)},
    )
    assert tolerated.verdict == "ok"


def test_work_is_exact_but_for_the_time_of_kernels(timed: Baseline) -> None:
    def verdict(**changes: Any) -> str:
        return compare(timed, load(metrics={**WORK, **changes}), section="work").verdict

    assert verdict() == "ok"
    assert verdict(**{"token.kernels": 696}) == "regressed"
    assert verdict(**{"token.kernels": 694}) == "improved"
    assert verdict(**{"token.gpu_time": 0.00226}) == "ok"
    assert verdict(**{"token.gpu_time": 0.00230}) == "regressed"


def test_work_of_another_torch_is_a_reason_only(timed: Baseline) -> None:
    result = load(metrics={**WORK, "token.ops": 2500}, environment=environment(torch="2.14.0+cu128"))
    work = compare(timed, result, section="work")
    assert (work.verdict, work.whole) == ("incomparable", False)
    times = compare(timed, result, section="time", times=timings(processes(1.2)))
    assert "token.ops 2,432 -> 2,500 (+68)" in times.because


def test_modules_that_changed_explain_a_time(timed: Baseline) -> None:
    comparison = compare(
        timed, load(metrics=WORK, manifest=manifest(PLAIN)), section="time", times=timings(processes(1.2))
    )
    assert comparison.because[0].startswith("160 x Linear4bit: ")


# --- parts of the load -----------------------------------------------------------------------------------------------


def made_of(seconds: float, **parts: float) -> list[LoadResult]:
    """Times of as many processes as a judgement needs, whose loads are made of ``parts``."""
    phases = {f"load.{name}": value for name, value in parts.items()}
    return [load(samples={"load": [seconds]}, phases=phases) for _ in range(10)]


def load_moved(before: list[LoadResult], after: list[LoadResult]) -> tuple[str, ...]:
    """What explains that the load takes other seconds than when it was recorded."""
    baseline = baseline_of(None, before, update=True, times=timings(before))
    comparison = compare(loads(dumps(baseline), "x.json"), after[0], section="time", times=timings(after))
    assert verdicts(comparison)["load"] != "ok"
    return comparison.because


def test_the_part_of_the_load_that_moved_is_named() -> None:
    before = made_of(3.0, read=0.5, convert=2.1, move=0.0, other=0.4)
    because = load_moved(before, made_of(4.9, read=0.5, convert=4.0, move=0.0, other=0.4))
    assert because[0] == "load.convert 2.10 s -> 4.00 s"
    assert not [line for line in because[1:] if line.startswith("load.")]
    back = load_moved(made_of(4.9, read=0.5, convert=4.0, move=0.0, other=0.4), before)
    assert back[0] == "load.convert 4.00 s -> 2.10 s"


def test_several_parts_are_named_by_what_they_moved() -> None:
    before = made_of(3.0, read=1.0, convert=1.0, move=0.5, other=0.5)
    because = load_moved(before, made_of(6.0, read=2.0, convert=2.9, move=0.5, other=0.6))
    assert because[:2] == ("load.convert 1.00 s -> 2.90 s", "load.read 1.00 s -> 2.00 s")
    assert not [line for line in because[2:] if line.startswith("load.")]


def test_without_parts_on_both_sides_none_is_named() -> None:
    with_parts = made_of(3.0, read=0.5, convert=2.1, move=0.0, other=0.4)
    for because in (load_moved(made_of(2.0), with_parts), load_moved(with_parts, made_of(5.0))):
        assert not [line for line in because if line.startswith("load.")]


def test_parts_that_most_processes_lack_are_not_kept() -> None:
    with_parts, without = made_of(3.0, read=3.0), made_of(3.0)
    assert timings(with_parts[:6] + without[:4])["load"].parts == {"load.read": 3.0}
    assert timings(with_parts[:5] + without[:5])["load"].parts == {}
