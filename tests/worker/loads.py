"""Loads in this process, with the real libraries, of small random models."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 - most loads import it, and its objects are frozen below
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from pytest_llmload.core.job import MEMORY, Adapter, Checkpoint, Device, Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.process import measuring_modules  # noqa: F401
from pytest_llmload.process.measurement import measure
from pytest_llmload.system.garbage import freeze
from pytest_llmload.worker.checkpoints.digests import adapter_digest
from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.model.loaded import Loaded

WORKLOAD = Workload(1, 8, 3)
CPU = Device("cpu", "cpu-x86_64")
CACHE = Path(os.environ["LLMLOAD_TEST_CACHE"])

# What the libraries keep is frozen, as in the server from which loads are forked: each load collects garbage, which
# would take half of its time.
freeze()


def by_target(target: str) -> dict[str, Any]:
    """Return the fields of a spec that a user's own loader serves."""
    return {"strategy": "loader", "target": target, "options": (("target", json.dumps(target)),)}


#: Every built-in way of loading that runs on a CPU, by what its spec sets.
STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {},
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "auto": {"strategy": "auto"},
    "balanced": {"strategy": "balanced"},
    "sequential": {"strategy": "sequential"},
    "max_memory": {"strategy": "max_memory"},
    "offload": {"strategy": "offload"},
    "int8": {"quant": "int8"},
    "nf4": {"quant": "nf4"},
    "fp4": {"quant": "fp4"},
    "nf4-dq": {"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"},
    "lora": {"adapter": "random"},
    "qlora": {"quant": "nf4", "adapter": "random"},
    "loader": by_target("loads:plain_loader"),
}


#: tiny-llama with a fifth of its weights: to quantise them takes most of the time of a load.
SMALL = "small-llama"
_SMALL_CONFIG = Path(__file__).parents[1] / "support" / "small-llama.json"


@functools.cache
def checkpoint(preset: str) -> Checkpoint:
    return resolve(f"random:{_SMALL_CONFIG if preset == SMALL else preset}", CACHE)


def job(preset: str | Checkpoint, **fields: Any) -> Job:
    files = checkpoint(preset) if isinstance(preset, str) else preset
    extra: dict[str, Any] = {
        name: fields.pop(name) for name in ("measure", "imports", "figures", "probes", "checks") if name in fields
    }
    spec = LoadSpec(model=files.path, name=Path(files.path).name, **{"workload": WORKLOAD, **fields})
    if spec.adapter is not None:
        extra["adapter"] = adapter_files(spec.adapter, files, spec.auto_class)
    return Job(spec=spec, device=CPU, checkpoint=files, **extra)


def adapter_files(adapter: str, files: Checkpoint, auto_class: str | None = None) -> Adapter:
    path = resolve_adapter(adapter, files, CACHE, auto_class=auto_class)
    return Adapter(str(path), adapter_digest(path, CACHE))


def measured(preset: str | Checkpoint, **fields: Any) -> LoadResult:
    """Return the result of a load, which may fail."""
    return measure(job(preset, **fields), lambda phase: None)[0]


def load(preset: str | Checkpoint, **fields: Any) -> tuple[LoadResult, Loaded]:
    """Return the result of a load that works, and the model."""
    result, loaded = measure(job(preset, **fields), lambda phase: None)
    assert loaded is not None, result.error
    return result, loaded


def quick(preset: str | Checkpoint, **fields: Any) -> LoadResult:
    """Return the result of a load whose times and work are not measured, which takes longer than the rest."""
    return measured(preset, figures=(MEMORY,), **fields)


def judged(preset: str | Checkpoint, **fields: Any) -> LoadResult:
    """Return the result of a load whose checks run, and nothing is measured: what a planted fault needs."""
    return measured(preset, figures=(), **fields)


def double_quant_loader(spec: LoadSpec) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    setting = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(spec.model, quantization_config=setting, device_map={"": "cpu"})


def plain_loader(spec: LoadSpec) -> Any:
    """What a user's own loader may look like."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto"), AutoTokenizer.from_pretrained(spec.model)
