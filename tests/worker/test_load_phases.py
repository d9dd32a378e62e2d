"""Where the seconds of a load go, against loads that take them in a known place."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from loads import SMALL, by_target, job, plain_loader

from pytest_llmload.core.job import MEMORY
from pytest_llmload.core.results import LOAD_PARTS, SAMPLED_PARTS, LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.probes import load_phases
from pytest_llmload.probes.load_phases import CONVERT, ENOUGH, MOVE, OTHER, READ
from pytest_llmload.process.measurement import measure, new_result

#: Enough for a load of some tenths of a second.
TIMES = 60


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_phases, "INTERVAL", 0.002)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert "load phases" not in [thread.name for thread in threading.enumerate()]


def loaded(model: str = "tiny-llama", **fields: Any) -> LoadResult:
    result = measure(job(model, figures=(MEMORY,), checks=False, **fields), lambda phase: None)[0]
    assert result.ok
    return result


def loaded_by(function: Callable[[LoadSpec], Any]) -> LoadResult:
    return loaded(**by(function))


def by(function: Callable[[LoadSpec], Any]) -> dict[str, Any]:
    return by_target(f"{__name__}:{function.__name__}")


def share(result: LoadResult, phase: str) -> float:
    assert result.phase_samples >= ENOUGH
    return result.phases[phase] / result.phases["load"]


# --- loaders that take their time in one place -----------------------------------------------------------------------


def reads_over_again(spec: LoadSpec) -> Any:
    from safetensors.torch import load_model

    model = plain_loader(spec)[0]
    for _ in range(TIMES):
        for file in Path(spec.model).glob("*.safetensors"):
            load_model(model, file, strict=False)
    return model


def moves_to_and_fro(spec: LoadSpec) -> Any:
    model = plain_loader(spec)[0]
    for _ in range(TIMES):
        model.to(torch.float32)
        model.to(torch.bfloat16)
    return model


def computes(spec: LoadSpec) -> Any:
    model = plain_loader(spec)[0]
    numbers = torch.ones(256, 256)
    for _ in range(20 * TIMES):
        numbers = (numbers @ numbers).clamp(0, 1)
    return model


def runs_out_of_memory(spec: LoadSpec) -> Any:
    moves_to_and_fro(spec)
    raise MemoryError("no more of it")


@pytest.fixture
def slow_quantise(monkeypatch: pytest.MonkeyPatch) -> None:
    quantise = bitsandbytes.functional.quantize_4bit

    def slow(*args: Any, **kwargs: Any) -> Any:
        for _ in range(5):
            quantise(*args, **kwargs)
        return quantise(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", slow)


# --- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow_quantise")
def test_a_slow_quantise_shows_in_convert() -> None:
    result = loaded(SMALL, quant="nf4")
    assert share(result, CONVERT) > 0.7
    assert share(result, READ) < 0.1
    assert share(result, MOVE) < 0.1


@pytest.mark.parametrize(
    ("loader", "phase"),
    [(reads_over_again, READ), (moves_to_and_fro, MOVE), (computes, OTHER)],
    ids=[READ, MOVE, OTHER],
)
def test_a_loaders_time_shows_where_it_is_spent(loader: Callable[[LoadSpec], Any], phase: str) -> None:
    result = loaded_by(loader)
    assert share(result, phase) > 0.6, result.phases


@pytest.mark.usefixtures("slow_quantise")
@pytest.mark.parametrize("adapter", [None, "random"])
def test_the_parts_add_up_to_the_load(adapter: str | None) -> None:
    result = loaded(SMALL, quant="nf4", adapter=adapter)
    parts = {name: result.phases[name] for name in LOAD_PARTS if name in result.phases}
    assert set(parts) == {*SAMPLED_PARTS, *(["adapter"] if adapter else [])}
    assert sum(parts.values()) == pytest.approx(result.phases["load"], rel=0.01)


def test_a_load_that_is_too_short_has_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_phases, "INTERVAL", 0.5)
    result = loaded()
    assert result.phase_samples < ENOUGH
    assert not set(result.phases) & set(SAMPLED_PARTS)


def test_a_load_that_runs_out_of_memory_has_the_parts_until_then() -> None:
    asked = job("tiny-llama", figures=(MEMORY,), checks=False, **by(runs_out_of_memory))
    result = new_result(asked)
    with pytest.raises(MemoryError, match="no more"):
        measure(asked, lambda phase: None, result)
    assert "load" not in result.phases
    parts = {name: result.phases[name] for name in SAMPLED_PARTS}
    assert parts[MOVE] > 0.6 * sum(parts.values())


def test_a_load_that_never_begins_leaves_no_thread() -> None:
    probe = load_phases.LoadPhases(job("tiny-llama"))
    probe.start()
    probe.close()
    probe.close()
    result = new_result(probe.job)
    probe.fill(result)
    assert (result.phase_samples, result.phases) == (0, {})


def test_what_a_load_imports_is_no_conversion() -> None:
    place = {"__name__": "bitsandbytes.functional", "phase_of": load_phases.phase_of, "frame": sys._getframe}
    exec("def quantise():\n    return phase_of(frame())\nimported, called = phase_of(frame()), quantise()", place)
    assert (place["imported"], place["called"]) == (OTHER, CONVERT)


# --- threads ---------------------------------------------------------------------------------------------------------


@contextmanager
def standing(module: str, function: str, body: str) -> Iterator[int]:
    """A thread that stands in a function of a module, as far as its frames tell; its identity."""
    lock, begun, event = threading.Lock(), threading.Event(), threading.Event()
    place: dict[str, Any] = {"__name__": module, "lock": lock, "begun": begun, "event": event}
    exec(f"def {function}():\n    begun.set()\n    {body}", place)
    lock.acquire()
    thread = threading.Thread(target=place[function], daemon=True)
    thread.start()
    assert begun.wait(60)
    assert thread.ident is not None
    try:
        yield thread.ident
    finally:
        event.set()
        lock.release()
        thread.join()


READER = ("transformers.core_model_loading", "_materialize_copy", "lock.acquire()")
CONVERTER = ("bitsandbytes.backends.cpu.ops", "_", "lock.acquire()")


def test_where_the_load_waits_the_threads_that_work_share_its_time() -> None:
    with standing("ours", "load", "event.wait()") as waiting, standing(*READER), standing(*CONVERTER):
        assert until(lambda: sorted(load_phases._phases(waiting)), [CONVERT, READ])


@pytest.mark.parametrize(
    ("module", "function", "phase"),
    [
        ("torchao.quantization.quant_api", "quantize_", CONVERT),
        ("optimum.quanto.quantize", "freeze", CONVERT),
        ("hqq.core.quantize", "quantize", CONVERT),
        ("compressed_tensors.compressors.base", "BaseCompressor", CONVERT),
        ("gguf.quants", "dequantize", CONVERT),
        ("gguf.gguf_reader", "GGUFReader", READ),
        ("transformers.modeling_gguf_pytorch_utils", "load_gguf_checkpoint", READ),
    ],
)
def test_the_functions_of_a_method_have_a_phase_and_exist(module: str, function: str, phase: str) -> None:
    pytest.importorskip(module.partition(".")[0] if module != "optimum.quanto.quantize" else "optimum.quanto")
    found = getattr(importlib.import_module(module), function, None)
    assert found is not None or hasattr(importlib.import_module("hqq.core.quantize").Quantizer, function)
    with standing(module, function, "lock.acquire()") as working:
        assert until(lambda: load_phases._phases(working), [phase])


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("gptqmodel.utils.model", "convert_gptq_v1_to_v2_format"),
        ("gptqmodel.utils.model", "gptqmodel_post_init"),
        ("gptqmodel.nn_modules.qlinear.torch_aten_kernel", "post_init"),
        ("optimum.gptq.quantizer", "post_init_model"),
    ],
)
def test_what_gptq_rewrites_after_it_has_read_is_conversion(module: str, function: str) -> None:
    with standing("ours", "load", "event.wait()") as waiting, standing(module, function, "lock.acquire()"):
        assert until(lambda: load_phases._phases(waiting), [CONVERT])


def test_a_wait_for_which_no_thread_works_is_other() -> None:
    with standing("ours", "load", "event.wait()") as waiting, standing("theirs", "heartbeat", "lock.acquire()"):
        assert until(lambda: load_phases._phases(waiting), [OTHER])


def test_a_load_that_works_is_where_its_own_thread_is() -> None:
    with standing("torch.nn.modules.module", "to", "lock.acquire()") as working, standing(*READER):
        assert until(lambda: load_phases._phases(working), [MOVE])


def test_a_look_keeps_nothing_alive() -> None:
    """What the load's functions drop is freed at once: else every temporary copy would count in its peak."""
    with standing("ours", "load", "event.wait()") as waiting, standing(*READER) as working:
        gc.collect()
        gc.disable()
        try:
            for thread in (waiting, working) * 20:
                load_phases._phases(thread)
            assert gc.collect() == 0
        finally:
            gc.enable()


def until(call: Callable[[], Any], expected: Any) -> bool:
    """Whether it comes to that: a thread takes a moment from its word that it has begun to where it stands."""
    for _ in range(6000):
        if call() == expected:
            return True
        threading.Event().wait(0.01)
    return False
