"""The counted work: the same in every clean run, and other where the model does other things."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loads import load, measured

from pytest_llmload.core.job import GENERATION_TIME, LOAD_TIME, WORK
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import Workload
from pytest_llmload.probes.work import count
from pytest_llmload.system.page_cache import page_cache, set_page_cache


def counted(model: str = "tiny-llama", **fields: Any) -> LoadResult:
    return load(model, figures=(WORK,), checks=False, **fields)[0]


def work(model: str = "tiny-llama", **fields: Any) -> dict[str, float]:
    metrics = counted(model, **fields).metrics
    return {name: value for name, value in metrics.items() if name != "load"}


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt-neox", "tiny-mixtral"])
def test_clean_runs_count_the_same(model: str) -> None:
    first = work(model)
    assert set(first) == {"prefill.ops", "token.ops"}
    assert first["token.ops"] > 100
    assert first == work(model)


def test_a_token_costs_the_same_wherever_it_stands() -> None:
    short, long = work(workload=Workload(1, 16, 3)), work(workload=Workload(1, 24, 12))
    assert short["token.ops"] == long["token.ops"]


def test_one_token_has_no_further_one() -> None:
    assert set(work(workload=Workload(1, 16, 1))) == {"prefill.ops"}


def test_eager_attention_takes_more_operators() -> None:
    assert work(attn="eager")["token.ops"] > work(attn="sdpa")["token.ops"]


def test_what_a_cpu_run_cannot_count_says_so() -> None:
    unavailable = counted().unavailable
    assert unavailable["token.kernels"] == unavailable["prefill.gpu_time"] == "no GPU in this run"


def test_nested_operators_are_counted() -> None:
    tensor = torch.ones(4, 4)
    with torch.no_grad():
        found = count(lambda: torch.nn.functional.linear(tensor, tensor), gpu=False)
    # aten::linear, and what it calls.
    assert found["ops"] >= 2
    assert not found["kernels"]


class _Event:
    def __init__(self, name: str, *, gpu: bool = False) -> None:
        self._name, self._gpu = name, gpu

    def name(self) -> str:
        return self._name

    def device_type(self) -> Any:
        return torch.autograd.DeviceType.CUDA if self._gpu else torch.autograd.DeviceType.CPU

    def duration_ns(self) -> int:
        return 2000

    def is_user_annotation(self) -> bool:
        return self._name == "my range"


def test_events_of_a_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [
        _Event("aten::mm"),
        _Event("cudaLaunchKernel"),
        _Event("cudaStreamSynchronize"),
        _Event("cuCtxSynchronize"),
        _Event("my range", gpu=True),
        _Event("ampere_sgemm_128x64", gpu=True),
        _Event("void at::native::elementwise_kernel", gpu=True),
        _Event("Memcpy HtoD (Pageable -> Device)", gpu=True),
        _Event("Memset (Device)", gpu=True),
    ]
    monkeypatch.setattr("pytest_llmload.probes.work._events", lambda profiler: events)
    found = count(lambda: None, gpu=False)
    assert (found["ops"], found["syncs"], found["kernels"], found["copies"]) == (1, 2, 2, 2)
    assert found["gpu_time"] == pytest.approx(4e-6)


def test_a_load_that_is_only_timed_has_its_times_and_nothing_else() -> None:
    result = measured("tiny-llama", figures=(LOAD_TIME, GENERATION_TIME), checks=False)
    assert result.ok
    assert set(result.metrics) == {"load", "ttft", "per_token"}
    assert len(result.samples["control"]) == len(result.samples["ttft"])
    assert len(result.samples["per_token.relative"]) == len(result.samples["per_token"])
    assert len(result.samples["ttft.relative"]) == len(result.samples["ttft"])
    assert not result.manifest


def test_the_page_cache_is_set_on_purpose(tmp_path: Any) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(8 << 20))
    folder = str(tmp_path)
    assert set_page_cache(folder, "uncontrolled") == page_cache(folder)
    found = set_page_cache(folder, "cold")
    if found == "uncontrolled":
        pytest.skip("this file system evicts nothing, or does not tell")
    assert found == page_cache(folder) == "cold"
    assert set_page_cache(folder, "warm") == page_cache(folder) == "warm"
