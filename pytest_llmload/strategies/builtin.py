"""The built-in strategies, by name. This module does not import torch: pytest reads the declarations at collection."""

from __future__ import annotations

from pytest_llmload.quantisation.registry import Methods
from pytest_llmload.strategies.base import Strategy
from pytest_llmload.strategies.deepspeed import DeepSpeed
from pytest_llmload.strategies.device_map import Auto, Balanced, Sequential
from pytest_llmload.strategies.dtype import Bf16, Fp16, Fp32
from pytest_llmload.strategies.loader import Loader
from pytest_llmload.strategies.lora import Lora, QLora
from pytest_llmload.strategies.max_memory import MaxMemory
from pytest_llmload.strategies.offload import Offload
from pytest_llmload.strategies.quantised import Configured, strategies_of
from pytest_llmload.strategies.served import Served
from pytest_llmload.strategies.single import Single
from pytest_llmload.strategies.tensor_parallel import TensorParallel
from pytest_llmload.strategies.tp_plan import TpPlan

_ALL: tuple[type[Strategy], ...] = (
    Single,
    Fp32,
    Fp16,
    Bf16,
    Auto,
    Balanced,
    Sequential,
    MaxMemory,
    Offload,
    *strategies_of(Methods().schemes.values()).values(),
    Configured,
    Lora,
    QLora,
    TensorParallel,
    TpPlan,
    DeepSpeed,
    Served,
    Loader,
)
#: Name -> class, in the order of the documentation and of the ready-made suite.
BUILTIN: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in _ALL}
