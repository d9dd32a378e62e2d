"""Predicted loads: against what GPUs measured, and the ends of a trace that cannot be whole."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import predict_baselines
from predict_gpu import CASES

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LOADED, LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.prediction import devices
from pytest_llmload.prediction.devices import PREDICTED
from pytest_llmload.prediction.predicted_process import predicted_process
from pytest_llmload.prediction.tracing import Tracing
from pytest_llmload.process.predicting import predict
from pytest_llmload.worker.model import loading
from pytest_llmload.worker.model.loaded import Loaded

#: What ``benchmarks/predict_gpu.py`` measured on one H200 (torch 2.11, transformers 5.17, bitsandbytes 0.50.2).
MEASURED: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "data" / "predicted.json").read_text())
BOUNDS = {"gpu.load_peak": 0.02, "gpu.generate_peak": 0.02, "gpu.reserved_peak": 0.05}
H100 = "nvidia-h100-80gb-hbm3"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("without-values")


def job(model: str, cache: Path, workload: str = "1x128+32", **fields: Any) -> Job:
    return predict_baselines.job_of(model, fields, Workload.parse(workload), cache)


def predicted(model: str, cache: Path, workload: str = "1x16+3", **fields: Any) -> LoadResult:
    return predict(job(model, cache, workload, **fields), lambda phase: None)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("neox")])
def test_figures_are_those_that_a_gpu_measured(name: str, cache: Path) -> None:
    """Six ways of loading one shape: weights, settled and the load's own work to the byte, peaks within their bounds.

    The other shapes: ``benchmarks/predict_baselines.py --measured``.
    """
    model, fields = CASES[name]
    result = predict(job(model, cache, **fields), lambda phase: None)
    assert (result.outcome, result.problems, result.unavailable) == (LOADED, [], {})
    for metric in PREDICTED:
        bound = BOUNDS.get(metric, 0.0)
        assert result.metrics[metric] == pytest.approx(MEASURED[name][metric], rel=bound, abs=0), metric


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "fp32"},
        {"strategy": "auto"},
        {"quant": "int8"},
        {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"},
        {"adapter": "random"},
        {"quant": "nf4", "adapter": "random"},
        {"adapter": "random", "adapter_merged": True},
        {"attn": "eager"},
    ],
    ids=lambda fields: LoadSpec(model="", name="", **fields).slug,
)
def test_every_way_of_loading_is_traced(fields: dict[str, Any], cache: Path) -> None:
    result = predicted("tiny-llama", cache, **fields)
    assert (result.outcome, result.problems, result.unavailable) == (LOADED, [], {})
    figures = result.metrics
    assert 0 < figures["gpu.weights"] <= figures["gpu.settled"] <= figures["gpu.load_peak"]
    assert figures["gpu.load_peak"] <= figures["gpu.reserved_peak"] >= figures["gpu.generate_peak"]
    assert torch.cuda.is_available() is False
    assert torch.empty(1, device="meta").device.type == "meta"


def test_a_transient_copy_shows_and_its_line_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = predicted("tiny-llama", cache)
    real = loading.from_pretrained

    def doubled(job: Job, kwargs: dict[str, Any]) -> Loaded:
        loaded = real(job, kwargs)
        for parameter in loaded.model.parameters():
            parameter.detach().clone()
        return loaded

    monkeypatch.setattr(loading, "from_pretrained", doubled)
    wasteful = predicted("tiny-llama", cache)
    assert wasteful.metrics["gpu.settled"] == plain.metrics["gpu.settled"]
    grown = wasteful.metrics["gpu.load_allocated"] - plain.metrics["gpu.load_allocated"]
    assert grown >= plain.metrics["gpu.weights"] * 0.99
    rows = [row for row in wasteful.sites["load"] if "doubled" in row[1]]
    assert [row[0] for row in rows] == ["aten.clone.default"]
    assert sum(row[2] for row in rows) == grown


def test_a_look_at_weights_is_unavailable_with_its_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    real = LlamaMLP.forward

    def branching(self: Any, x: Any) -> Any:
        return real(self, x) if x.abs().max() > 0 else x

    monkeypatch.setattr(LlamaMLP, "forward", branching)
    result = predicted("tiny-llama", cache)
    assert result.outcome == LOADED
    assert "gpu.settled" in result.metrics
    assert set(result.unavailable) == {"gpu.generate_peak"} | ({"gpu.reserved_peak"} - result.metrics.keys())
    reason = result.unavailable["gpu.generate_peak"]
    assert "reads values that are computed from weights" in reason
    assert "branching" in reason


def test_a_device_that_is_too_small_runs_out_of_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(devices.MODELS[H100], total=(2 << 30) + devices.MODELS[H100].context)
    monkeypatch.setitem(devices.MODELS, H100, small)
    with pytest.raises(RuntimeError, match="out of memory"):
        predicted("llama-1b", cache)


def test_tensors_of_the_device_say_so_and_take_its_memory() -> None:
    tracing = Tracing(devices.MODELS[H100], 2)
    with predicted_process(tracing, "13.0"):
        first = torch.arange(6, device="cuda").view(2, 3)
        assert (first.device, first.is_cuda, first.is_meta) == (torch.device("cuda", 0), True, False)
        assert first[1, 2].item() == 5
        first[0, 0] = 7
        assert first.sum().item() == 7 + 15
        second = torch.ones(4, dtype=torch.float16).to(1) * 2.5
        assert (second.device, second.dtype, second.tolist()) == (torch.device("cuda", 1), torch.float16, [2.5] * 4)
        weights = torch.nn.Linear(512, 512, device="cuda:1", dtype=torch.bfloat16)
        assert torch.cuda.memory_allocated(1) == 512 + 512 * 512 * 2 + 1024
        del weights, second
        assert torch.cuda.memory_allocated(1) == 0
        with pytest.raises(RuntimeError, match="same device"):
            first + torch.zeros(2, 3, device="cuda:1", dtype=torch.long)
    assert torch.ones(3).device.type == "cpu"
