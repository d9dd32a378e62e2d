"""A stand-in for gptqmodel and optimum, which need kernels: layers of GPTQ and AWQ that a CPU runs, put in place.

As GPTQModel 7.7 does it (``convert_gptq_v1_to_v2_format``, ``TorchAtenLinear``): the zero points of version 1 go up by
one after the weights are read.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

#: One in each of the eight nibbles of a word.
_ONES = 0x11111111


class TorchAtenLinear(nn.Module):  # type: ignore[misc]
    """A Linear of 4-bit codes in groups; everything that it holds is a buffer."""

    def __init__(self, inputs: int, outputs: int, group: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = inputs, outputs, 4
        self.register_buffer("qweight", torch.zeros(inputs // 8, outputs, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(inputs // group, outputs // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(inputs // group, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))

    def forward(self, hidden: Any) -> Any:
        places = self.g_idx.long()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = (self.qweight[:, None] >> shifts[None, :, None] & 15).flatten(0, 1)
        zeros = (self.qzeros[..., None] >> shifts & 15).flatten(1)
        return hidden @ ((codes - zeros[places]) * self.scales[places]).to(hidden.dtype)


class Quantizer:
    """What ``optimum.gptq`` offers to transformers for a checkpoint that is quantised already."""

    #: How much the zero points of version 1 go up while loading.
    step = 1

    def __init__(self, config: dict[str, Any]) -> None:
        self.group = config["group_size"]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Quantizer:
        return cls(config)

    def convert_model(self, model: Any, **kwargs: Any) -> Any:
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and path.endswith("_proj"):
                model.set_submodule(path, TorchAtenLinear(module.in_features, module.out_features, self.group))
        return model

    def post_init_model(self, model: Any) -> Any:
        for module in model.modules():
            if isinstance(module, TorchAtenLinear):
                module.qzeros += _ONES * self.step
        return model


class AwqTorchLinear(nn.Module):  # type: ignore[misc]
    """A Linear of 4-bit codes along the outputs, in AWQ's order; everything that it holds is a buffer."""

    #: The bits that each output of a word is shifted by.
    shifts = (0, 16, 4, 20, 8, 24, 12, 28)

    def __init__(self, in_features: int, out_features: int, group_size: int, **settings: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, settings["bits"]
        words, groups = out_features // 8, in_features // group_size
        self.register_buffer("qweight", torch.zeros(in_features, words, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, words, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))

    def forward(self, hidden: Any) -> Any:
        shifts = torch.tensor(self.shifts, dtype=torch.int32)
        codes, zeros = ((words[..., None] >> shifts & 15).flatten(1) for words in (self.qweight, self.qzeros))
        group = len(codes) // len(zeros)
        zeros, scales = zeros.repeat_interleave(group, dim=0), self.scales.repeat_interleave(group, dim=0)
        return hidden @ ((codes - zeros) * scales).to(hidden.dtype)


def install_awq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find the stand-in in the place of gptqmodel."""
    from transformers.quantizers import quantizer_awq

    made: dict[str, dict[str, Any]] = {
        "gptqmodel": {},
        "gptqmodel.quantization": {"METHOD": SimpleNamespace(AWQ="awq")},
        "gptqmodel.quantization.awq": {},
        "gptqmodel.quantization.awq.modules": {},
        "gptqmodel.quantization.awq.modules.act": {"ScaledActivation": None},
        "gptqmodel.utils": {},
        "gptqmodel.utils.importer": {"hf_select_quant_linear_v2": lambda **settings: AwqTorchLinear},
        "gptqmodel.utils.model": {"hf_gptqmodel_post_init": lambda model, **settings: None},
    }
    for name, values in made.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(quantizer_awq, "is_gptqmodel_available", lambda: True)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find the stand-in in the place of both packages."""
    from transformers.quantizers import quantizer_gptq

    optimum = ModuleType("optimum.gptq")
    optimum.__spec__ = ModuleSpec("optimum.gptq", None)
    optimum.GPTQQuantizer = Quantizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optimum.gptq", optimum)
    for asked in ("is_optimum_available", "is_gptqmodel_available"):
        monkeypatch.setattr(quantizer_gptq, asked, lambda: True)
    monkeypatch.setattr(quantizer_gptq, "metadata", SimpleNamespace(version=lambda name: "99"))
