"""Several ranks' results as one: sums, names, and what they disagree in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Checkpoint, Device, Gpu, Job
from pytest_llmload.core.results import LoadResult, ManifestRow, Numbers, Problem
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.process.ranks.merge import merge
from pytest_llmload.process.ranks.rank import own_job
from pytest_llmload.system import nodes
from pytest_llmload.worker.parallel import world

SPEC = LoadSpec(model="random:tiny-llama", name="tiny-llama", strategy="tp_plan", world_size=2)
GPUS = tuple(Gpu(f"GPU-{index}", "H100", 80 << 30, (9, 0), index) for index in range(2))
JOB = Job(spec=SPEC, device=Device("cuda", "nvidia-h100", GPUS), checkpoint=Checkpoint("/x", "s", "w"))
ROW = ManifestRow("model.layers.*.q_proj", "0-2", "Linear", "bfloat16", "cuda:0", "", 3, 300)


def result(**fields: Any) -> LoadResult:
    metrics = {"gpu.0.settled": 10.0, "gpu.settled": 10.0, "weights.logical": 8.0, "load": 1.0, "ttft": 0.1}
    plain = LoadResult(
        spec=SPEC.to_json(),
        outcome="loaded",
        metrics=metrics | {"host.peak": 5.0, "host.settled": 3.0, "shard.0.logical": 8.0},
        samples={"load": [1.0], "ttft": [0.1, 0.1]},
        phase_peaks={"load": {"gpu.0": 7.0, "host": 2.0}},
        phases={"load": 1.0},
        ledger=[{"gpu": 0, "weights": 8.0}],
        numbers=Numbers(logits=[1.0, 2.0]),
        manifest=[ROW],
        notes=["as the first says"],
        whole_bytes=16,
    )
    return dataclasses.replace(plain, **fields)


def test_memory_is_summed_and_each_gpu_has_its_ranks_number() -> None:
    second = result(
        metrics={**result().metrics, "gpu.0.settled": 11.0, "gpu.settled": 11.0, "load": 2.0}, phases={"load": 2.0}
    )
    second.samples = {"load": [2.0], "load.relative": [20.0], "load.control": [0.1, 0.1], "ttft": [0.3, 0.3]}
    merged = merge(JOB, {0: result(), 1: second})
    assert merged.ok
    assert merged.metrics == {
        "gpu.0.settled": 10.0,
        "gpu.1.settled": 11.0,
        "gpu.settled": 21.0,
        "weights.logical": 16.0,
        "host.peak": 10.0,
        "host.settled": 6.0,
        "shard.0.logical": 8.0,
        "shard.1.logical": 8.0,
        "shard.0.peak": 5.0,
        "shard.1.peak": 5.0,
        "shard.0.settled": 3.0,
        "shard.1.settled": 3.0,
        "load": 2.0,
        "ttft": 0.1,
    }
    assert merged.samples == {**second.samples, "ttft": [0.1, 0.1]}, "the slowest rank's load, the first rank's tokens"
    assert merged.phase_peaks == {"load": {"gpu.0": 7.0, "gpu.1": 7.0, "host": 4.0}}
    assert [row["gpu"] for row in merged.ledger] == [0, 1]
    assert merged.whole_bytes == 16


def test_what_one_rank_could_not_measure_has_no_sum() -> None:
    metrics = {name: value for name, value in result().metrics.items() if name != "host.peak"}
    merged = merge(JOB, {0: result(), 1: result(metrics=metrics, unavailable={"host.peak": "no clear_refs"})})
    assert "host.peak" not in merged.metrics
    assert merged.unavailable == {"host.peak": "no clear_refs"}


def test_problems_and_notes_name_their_ranks_where_not_all_have_them() -> None:
    common, own = Problem("keys", "three keys are missing"), Problem("dtype", "one parameter is float32")
    adapter = Problem("adapter", "the file says rank 8")
    named = Problem("shards", "rank 1 holds the whole model", rank=1)
    notes = ["as the first says", "something", "an adapter of rank 8"]
    merged = merge(JOB, {0: result(problems=[common]), 1: result(problems=[common, own, adapter, named], notes=notes)})
    assert merged.outcome == "not_applied"
    assert [problem.message for problem in merged.problems] == [
        "three keys are missing",
        "rank 1: one parameter is float32",
        "rank 1: the file says rank 8",
        "rank 1 holds the whole model",
    ]
    assert merged.notes == ["as the first says", "rank 1: something", "rank 1: an adapter of rank 8"]


def test_ranks_whose_logits_differ_run_no_model_together() -> None:
    close = result(numbers=Numbers(logits=[1.0, 2.00001]))
    assert merge(JOB, {0: result(), 1: close}).problems == []
    for logits, off in (([1.0, 2.5], "2.24e-01"), ([1.0], "inf"), ([float("nan"), 2.0], "nan")):
        (problem,) = merge(JOB, {0: result(), 1: result(numbers=Numbers(logits=logits))}).problems
        assert problem.check == "ranks"
        assert problem.message.startswith(f"rank 1's logits are {off} off rank 0's: ")


def test_rows_of_the_manifest_that_differ_stand_under_their_rank() -> None:
    alike = merge(JOB, {0: result(), 1: result()}).manifest
    assert alike == [dataclasses.replace(ROW, device="2 x cuda", count=6, bytes=600)]
    other = dataclasses.replace(ROW, dtype="float32", bytes=600)
    apart = merge(JOB, {0: result(), 1: result(manifest=[other])}).manifest
    assert [(row.module, row.dtype, row.device) for row in apart] == [
        ("rank0.model.layers.*.q_proj", "bfloat16", "cuda of rank 0"),
        ("rank1.model.layers.*.q_proj", "float32", "cuda of rank 1"),
    ]


def test_the_parts_of_the_load_are_those_of_the_slowest_rank() -> None:
    """The longest of each would add up to more than any rank's load."""
    fast = {"context": 2.0, "load": 3.0, "load.read": 2.5, "load.other": 0.5, "adapter": 1.0}
    slow = {"context": 1.0, "load": 4.0, "load.read": 1.0, "load.other": 3.0}
    merged = merge(JOB, {0: result(phases=fast, phase_samples=300), 1: result(phases=slow, phase_samples=400)})
    assert merged.phases == {"context": 2.0, "load": 4.0, "load.read": 1.0, "load.other": 3.0}
    assert merged.phase_samples == 400


def test_a_rank_sees_the_one_gpu_of_its_number() -> None:
    assert [gpu.uuid for gpu in own_job(JOB, 1).device.gpus] == ["GPU-1"]
    cpu = dataclasses.replace(JOB, device=Device("cpu", "cpu-x86_64"))
    assert own_job(cpu, 1) is cpu


def test_ranks_are_divided_among_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes.local_size(4) == 4
    monkeypatch.setenv("PET_NNODES", "2")
    assert nodes.local_size(4) == 2
    with pytest.raises(MachineError, match="world_size=3 does not divide among 2 nodes"):
        nodes.local_size(3)
    monkeypatch.setenv("PET_NNODES", "2:4")
    assert nodes.nodes() == 2
    for text in ("abc", "0", "-1", "", ":2"):
        monkeypatch.setenv("PET_NNODES", text)
        with pytest.raises(MachineError, match=f"PET_NNODES='{text}' is not a number of nodes: set it to 1 or more"):
            nodes.local_size(4)


def test_one_rank_a_machine_answers_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads the whole model for the comparison; all of them together would not fit."""
    assert world.answers()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        found.append(world.answers())
    assert found == [True, False, True, False]
