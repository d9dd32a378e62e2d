"""The markers' signatures and one-sentence help, as ``pytest --markers`` prints them."""

from __future__ import annotations

import inspect
from typing import Any


def quant(
    *schemes: str,
    double_quant: bool = False,
    compute_dtype: str | None = None,
    skip_modules: Any = (),
    dense_ok: Any = (),
) -> None:
    """Load quantised: none (as the checkpoint says), int8, nf4, fp4, or a scheme of a different method."""


def dtype(*names: str) -> None:
    """Load in fp32, fp16 or bf16."""


def strategy(*names: str, **options: Any) -> None:
    """Load under these strategies; unknown options go to from_pretrained."""


def gpu_count(n: int) -> None:
    """Give the load n GPUs; skip where fewer are visible."""


def lora(adapter: str | None = None, via: str = "peft", merged: bool = False) -> None:
    """Load with a PEFT adapter."""


def device_map(value: Any, max_memory: Any = None) -> None:
    """Load with this device map, perhaps under limits such as {0: '10GiB', 'cpu': '30GiB'}."""


def attn(name: str) -> None:
    """Load with this attention implementation, and check that it is the one in use."""


def auto_class(name: str) -> None:
    """Load with this Auto class instead of the one the config's architecture names."""


def workload(text: str) -> None:
    """Take the figures on this workload: BATCHxPROMPT+NEW, as in '4x2048+64'."""


def gpu_memory(size: str) -> None:
    """Skip where a GPU has less memory in total, as in '40GiB'."""


def memory_ceiling(*, gpu: str | None = None, host: str | None = None, phase: str | None = None) -> None:
    """Fail if a GPU or the host needs more, in any phase or the named one (load, forward, generate)."""


def latency_budget(*, load: str | None = None, ttft: str | None = None, per_token: str | None = None) -> None:
    """Fail if the median load time, time to first token or time per token is longer."""


#: Markers that say what to load; each is an axis of variants.
LOAD_MARKERS = {
    function.__name__: function
    for function in (strategy, quant, dtype, lora, device_map, gpu_count, attn, auto_class, workload)
}
#: Markers that bound what a load may need.
LIMITS = {function.__name__: function for function in (gpu_memory, memory_ceiling, latency_budget)}
#: Markers that say what a test needs of the machine, whatever it loads.
HARDWARE = frozenset({"gpu_count", "gpu_memory"})


def lines() -> list[str]:
    """The lines of ``pytest --markers``."""
    found = [
        f"{name}{signature_text(function)}: {function.__doc__}" for name, function in {**LOAD_MARKERS, **LIMITS}.items()
    ]
    return [*found, "llmload(suite=False): Uses a load of a model (set by pytest-llmload itself; for -m 'not llmload')"]


def signature_text(function: Any) -> str:
    """A marker's signature as people write it: without annotations."""
    signature = inspect.signature(function)
    parameters = [value.replace(annotation=value.empty) for value in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))
