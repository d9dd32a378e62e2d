"""MXFP4: experts in e2m1 with one power-of-two scale for 32 values, as gpt-oss has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_llmload.quantisation.base import Method, Stored

#: The values of e2m1's codes.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BLOCK, _BIAS = 32, 127


@dataclass(frozen=True, eq=False)
class StoredMxfp4(Stored):
    """Blocks: experts x outputs x inputs/32 x 16 bytes, the lower half first; scales: e8m0, one a block.

    The dense model has experts x inputs x outputs, so that a row of the weight is a column of the blocks.
    """

    scales: Any = None
    #: True if the values can be read: kernels for GPUs swizzle them.
    is_plain: bool = True

    @property
    def bits(self) -> float:
        return 4.0

    def describe(self) -> str:
        """Return the entry for the manifest: ``mxfp4 block=32``."""
        return f"{self.scheme} block={_BLOCK}"

    def dequantised(self, start: int, stop: int) -> Any:
        import torch

        if not self.is_plain:
            raise NotImplementedError("a kernel has swizzled the values")
        _, inputs, outputs = self.shape
        first, last = start // outputs, -(-stop // outputs)
        rows = [self._row(*divmod(row, inputs)) for row in range(first, last)]
        return torch.cat(rows)[start - first * outputs : stop - first * outputs]

    def _row(self, expert: int, place: int) -> Any:
        import torch

        block, within = divmod(place, _BLOCK)
        packed = self.data[expert : expert + 1][0][:, block, within // 2].cpu().int()
        code = (packed >> 4) if within % 2 else packed & 15
        scale = self.scales[expert : expert + 1][0][:, block].cpu().float() - _BIAS
        return torch.tensor(_E2M1)[code.long()] * torch.exp2(scale)


class Mxfp4(Method):
    """Experts of gpt-oss."""

    name = "mxfp4"
    summary = "Checkpoints of gpt-oss: experts in e2m1 with one scale for 32 values."
    imports = ("transformers.integrations.mxfp4",)
    file_methods = ("mxfp4",)
    runs_on = "GPU with Triton and the package `kernels`; elsewhere transformers loads it dense"
    held_as = "swizzled blocks and scales of Triton's kernels"
    proved = "that experts are packed; if they are dense, the failure gives the size that the files hold packed"

    def read(self, module: Any) -> Iterable[Stored]:
        if type(module).__name__ != "Mxfp4GptOssExperts":
            return
        for name, outputs, inputs in (
            ("gate_up_proj", 2 * module.intermediate_size, module.hidden_size),
            ("down_proj", module.hidden_size, module.intermediate_size),
        ):
            held = module._parameters.get(name)
            data = held if held is not None else getattr(getattr(module, name, None), "data", None)
            # A Triton tensor keeps its packed values in its own storage.
            data = getattr(getattr(module, name, None), "storage", None) if data is None else data
            data = getattr(data, "data", data)
            if data is not None:
                shape = (int(module.num_experts), int(inputs), int(outputs))
                yield StoredMxfp4("mxfp4", shape, data, (name,), name, is_plain=False)

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        blocks, scales = tensors.get(f"{name}_blocks"), tensors.get(f"{name}_scales")
        if blocks is None or scales is None:
            return None
        experts, outputs, count, _ = blocks.get_shape()
        return StoredMxfp4("mxfp4", (experts, count * _BLOCK, outputs), blocks, (name,), name, scales=scales)
