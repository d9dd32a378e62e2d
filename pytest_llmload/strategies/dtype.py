"""Weights in one floating dtype."""

from __future__ import annotations

from typing import Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.strategies.base import Strategy


class _Dtype(Strategy):
    torch_name: ClassVar[str]

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        import torch

        return {"dtype": getattr(torch, self.torch_name)}


class Fp32(_Dtype):
    name = "fp32"
    summary = "Weights in float32."
    fields: ClassVar[dict[str, Any]] = {"dtype": "fp32"}
    torch_name = "float32"


class Fp16(_Dtype):
    name = "fp16"
    summary = "Weights in float16."
    fields: ClassVar[dict[str, Any]] = {"dtype": "fp16"}
    torch_name = "float16"


class Bf16(_Dtype):
    name = "bf16"
    summary = "Weights in bfloat16."
    fields: ClassVar[dict[str, Any]] = {"dtype": "bf16"}
    torch_name = "bfloat16"
