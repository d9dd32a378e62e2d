"""The built-in strategies and probes, by import string: naming one costs no import of torch."""

from __future__ import annotations

import importlib
import re
from typing import Any

_STRATEGIES = "pytest_llmload.strategies"
_PROBES = "pytest_llmload.probes"

#: Strategy name -> ``module:Class``.
BUILTIN_STRATEGIES: dict[str, str] = {
    "single": f"{_STRATEGIES}.single:Single",
    "fp32": f"{_STRATEGIES}.dtype:Fp32",
    "fp16": f"{_STRATEGIES}.dtype:Fp16",
    "bf16": f"{_STRATEGIES}.dtype:Bf16",
    "auto": f"{_STRATEGIES}.device_map:Auto",
    "balanced": f"{_STRATEGIES}.device_map:Balanced",
    "sequential": f"{_STRATEGIES}.device_map:Sequential",
    "max_memory": f"{_STRATEGIES}.max_memory:MaxMemory",
    "offload": f"{_STRATEGIES}.offload:Offload",
    "int8": f"{_STRATEGIES}.bitsandbytes:Int8",
    "nf4": f"{_STRATEGIES}.bitsandbytes:Nf4",
    "fp4": f"{_STRATEGIES}.bitsandbytes:Fp4",
    "lora": f"{_STRATEGIES}.lora:Lora",
    "qlora": f"{_STRATEGIES}.lora:QLora",
    "tensor_parallel": f"{_STRATEGIES}.tensor_parallel:TensorParallel",
    "tp_plan": f"{_STRATEGIES}.tp_plan:TpPlan",
    "deepspeed": f"{_STRATEGIES}.deepspeed:DeepSpeed",
    "served": f"{_STRATEGIES}.served:Served",
    "loader": f"{_STRATEGIES}.loader:Loader",
}

_LOAD_PHASES = f"{_PROBES}.load_phases:LoadPhases"
#: ``module:Class`` of each probe, in the order they run: those that read the allocators come first,
#: so that what the others allocate is never part of a figure.
BUILTIN_PROBES: tuple[str, ...] = (
    f"{_PROBES}.gpu_memory:GpuMemory",
    f"{_PROBES}.host_memory:HostMemory",
    f"{_PROBES}.weights:Weights",
    f"{_PROBES}.driver:Driver",
    f"{_PROBES}.manifest:Manifest",
    f"{_PROBES}.other_tensors:OtherTensors",
    f"{_PROBES}.numbers:Fingerprint",
    _LOAD_PHASES,
    f"{_PROBES}.timing:Timing",
)
#: The probes of a load of which only its own time is wanted.
LOADING_PROBES: tuple[str, ...] = (_LOAD_PHASES, f"{_PROBES}.load_control:LoadControl")
#: The probes of a load that repeats another one for its times alone.
TIME_PROBES: tuple[str, ...] = (*LOADING_PROBES, f"{_PROBES}.rounds:Rounds")
#: The probes of a load that repeats another one under the profiler, which is nowhere near anything that is timed.
WORK_PROBES: tuple[str, ...] = (f"{_PROBES}.work:Work",)


def is_reference(text: str) -> bool:
    """Whether a text is ``package.module:name``, whatever is there."""
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*:\w+(\.\w+)*", text) is not None


def resolve(reference: str) -> Any:
    """The object that ``package.module:name`` names.

    Raises ValueError where the text is no such reference, ImportError and AttributeError where nothing is there.
    """
    if not is_reference(reference):
        raise ValueError(f"{reference!r} is no import string: write 'package.module:name'")
    module, _, name = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
