"""Weights quantised by bitsandbytes while they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.job import Job
from pytest_llmload.quantisation.bitsandbytes import offload_setting
from pytest_llmload.strategies.base import Strategy

_PACKAGES = (*Strategy.packages, "bitsandbytes")


class _Bitsandbytes(Strategy):
    packages = _PACKAGES
    #: Further settings of transformers' BitsAndBytesConfig, under its own names.
    options: ClassVar[tuple[str, ...]] = (
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "bnb_4bit_quant_storage",
    )

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        settings = offload_setting(job)
        settings |= {name: job.spec.option(name) for name in self.options if job.spec.option(name) is not None}
        settings |= self.settings(job)
        if job.spec.skip_modules:
            settings["llm_int8_skip_modules"] = [*default_skips(job), *job.spec.skip_modules]
        return {"quantization_config": BitsAndBytesConfig(**settings)}

    def settings(self, job: Job) -> dict[str, Any]:
        raise NotImplementedError


class Int8(_Bitsandbytes):
    name = "int8"
    summary = "LLM.int8(): weights in 8 bit, outlier activations in 16 bit."
    fields: ClassVar[dict[str, Any]] = {"quant": "int8"}

    def settings(self, job: Job) -> dict[str, Any]:
        return {"load_in_8bit": True}


class _FourBit(_Bitsandbytes):
    def settings(self, job: Job) -> dict[str, Any]:
        import torch

        settings: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": self.name}
        if job.spec.double_quant:
            settings["bnb_4bit_use_double_quant"] = True
        if job.spec.compute_dtype:
            settings["bnb_4bit_compute_dtype"] = getattr(torch, TORCH_NAMES[job.spec.compute_dtype])
        return settings


class Nf4(_FourBit):
    name = "nf4"
    summary = "Weights in NormalFloat 4, with or without double quant."
    fields: ClassVar[dict[str, Any]] = {"quant": "nf4"}
    also = ({"quant": "nf4", "double_quant": True},)


class Fp4(_FourBit):
    name = "fp4"
    summary = "Weights in 4-bit floating point."
    fields: ClassVar[dict[str, Any]] = {"quant": "fp4"}


def default_skips(job: Job) -> list[str]:
    """The modules that transformers leaves dense when nobody names any: output head and tied weights.

    Naming modules replaces them (transformers/quantizers/base.py, ``get_modules_to_not_convert``), which would quantise
    the head without a word; so the union is passed.
    """
    from transformers.quantizers.base import HfQuantizer

    from pytest_llmload.worker.checkpoints.architecture import meta_model

    model = meta_model(
        Path(job.checkpoint.path), trust_remote_code=job.trust_remote_code, auto_class=job.spec.auto_class
    )
    return list(HfQuantizer.get_modules_to_not_convert(model))
