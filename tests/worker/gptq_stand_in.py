"""A stand-in for gptqmodel and optimum, which need kernels: a layer of GPTQ that a CPU runs, and who puts it in place.

As GPTQModel 7.7 does it (``convert_gptq_v1_to_v2_format``, ``TorchAtenLinear``): the zero points of version 1 go up by
one after the weights are read.
"""

from __future__ import annotations

import sys
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


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers find the stand-in in the place of both packages."""
    from transformers.quantizers import quantizer_gptq

    optimum = ModuleType("optimum.gptq")
    optimum.GPTQQuantizer = Quantizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optimum.gptq", optimum)
    for asked in ("is_optimum_available", "is_gptqmodel_available"):
        monkeypatch.setattr(quantizer_gptq, asked, lambda: True)
    monkeypatch.setattr(quantizer_gptq, "metadata", SimpleNamespace(version=lambda name: "99"))
