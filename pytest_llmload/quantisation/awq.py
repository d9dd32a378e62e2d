"""AWQ: 4-bit values packed along the outputs, in an order of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_llmload.quantisation.base import Method, Stored
from pytest_llmload.quantisation.gptq import HOLDERS, StoredGptq, is_awq
from pytest_llmload.quantisation.grouped import unpacked

#: The output that each nibble of a word belongs to, from the lowest (AutoAWQ, ``pack_intweight``, version gemm).
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, eq=False)
class StoredAwq(StoredGptq):
    """``qweight``: inputs x outputs/8; zero points: groups x outputs/8; scales: groups x outputs."""

    def _outputs(self, words: Any, first: int, last: int) -> Any:
        """Return the columns ``first`` to ``last`` of packed words, which start at a whole word."""
        import torch

        values = unpacked(words, 4, 1 << 30).reshape(words.shape[0], -1, 8)
        order = torch.tensor([_ORDER.index(output) for output in range(8)])
        return values[..., order].reshape(words.shape[0], -1)[:, first : first + last]

    def codes(self, first: int, last: int) -> Any:
        import torch

        if hasattr(self.data, "dtype") and self.data.dtype != torch.int32:
            raise NotImplementedError("a kernel has repacked the values")
        begin = first // 8
        words = self.data[:, begin : -(-last // 8)].detach().cpu()
        return self._outputs(words, first - begin * 8, last - first).t().float()

    def row_zeros(self, first: int, last: int) -> Any:
        begin = first // 8
        words = self.zeros[:, begin : -(-last // 8)].detach().cpu()
        return self._outputs(words, first - begin * 8, last - first).t().float()


class Awq(Method):
    """Checkpoints of AutoAWQ and llm-awq."""

    name = "awq"
    summary = "Checkpoints of AutoAWQ: packed 4 bit."
    packages = ("gptqmodel",)
    imports = ("gptqmodel",)
    file_methods = ("awq",)
    runs_on = "CPU, GPU"
    held_as = "int32 buffers `qweight`, `qzeros`, `scales`; kernels repack them in the first forward"
    proved = "scales are the file's; a block dequantised from the module equals that of the file"

    def read(self, module: Any) -> Iterable[Stored]:
        tensors = {**module._parameters, **module._buffers}
        if tensors.get("qweight") is None or tensors.get("qzeros") is None or tensors.get("scales") is None:
            return
        inputs = getattr(module, "in_features", None)
        if is_awq(tensors, inputs):
            yield _stored(tensors, (int(module.out_features), int(module.in_features)))

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        if name != "weight" or not {"qweight", "qzeros", "scales"} <= set(tensors):
            return None
        inputs, words = tensors["qweight"].get_shape()
        return _stored(tensors, (words * 8, inputs))


def _stored(tensors: Mapping[str, Any], shape: tuple[int, int]) -> Stored:
    return StoredAwq(
        "awq-int4",
        shape,
        tensors["qweight"],
        HOLDERS,
        scales=tensors["scales"],
        zeros=tensors["qzeros"],
        code_bits=4,
    )
