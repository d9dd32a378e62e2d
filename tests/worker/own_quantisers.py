"""What users' own code may look like: functions that return a quantization_config, and loaders that quantise."""

from __future__ import annotations

from typing import Any

from pytest_llmload.core.spec import LoadSpec


def intx_int4(spec: LoadSpec) -> Any:
    """torchao's weight-only intx: 4-bit values, of which each takes a byte."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))


def nothing(spec: LoadSpec) -> Any:
    """A config that leaves every layer dense."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["model", "lm_head"])


def quanto_config(spec: LoadSpec) -> Any:
    """quanto's 8 bit, as ``quant("quanto-int8")`` asks for it."""
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def _dense(spec: LoadSpec) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")


def torchao_int8(spec: LoadSpec) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = _dense(spec)
    quantize_(model.model, Int8WeightOnlyConfig())
    return model


def hqq(spec: LoadSpec) -> Any:
    """What transformers 5 cannot: every Linear of the layers in 4 bit."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = _dense(spec)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, HQQLinear(child, config, compute_dtype=torch.bfloat16, device="cpu"))
    return model


def quanto_int4(spec: LoadSpec) -> Any:
    from optimum.quanto import freeze, qint4, quantize

    model = _dense(spec)
    quantize(model, weights=qint4, exclude="lm_head")
    freeze(model)
    return model


def quanto_int8(spec: LoadSpec) -> Any:
    from optimum.quanto import freeze, qint8, quantize

    model = _dense(spec)
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    return model
