"""GPTQ: packed integers, zero points and scales in buffers of a module that GPTQModel makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_llmload.quantisation.base import Method, Stored, shape_of
from pytest_llmload.quantisation.grouped import Grouped, unpacked

HOLDERS = ("qweight", "scales", "qzeros", "g_idx")
#: Bits of a code that do not cross the words they are packed in.
_PLAIN_BITS = (2, 4, 8)


@dataclass(frozen=True, eq=False)
class StoredGptq(Grouped):
    """``qweight``: inputs/(32/bits) x outputs, lowest bits first; scales and zero points: groups x outputs."""

    #: The group of each input; None without act-order.
    places: Any = None
    #: The number that is added to a stored zero point: 1 in version 1 of the format.
    offset: int = 0

    @property
    def group(self) -> int:
        return int(self.shape[-1]) // shape_of(self.scales)[0]

    @property
    def max_error(self) -> float | None:
        # The codes minimise the error of a layer's output on calibration data, not that of each value.
        return None

    def kept(self) -> dict[str, Any]:
        return {"scales": self.scales}

    def codes(self, first: int, last: int) -> Any:
        import torch

        bits = int(self.code_bits)
        if bits not in _PLAIN_BITS or (hasattr(self.data, "dtype") and self.data.dtype != torch.int32):
            raise NotImplementedError("a kernel has repacked the values")
        words = self.data[:, first:last].detach().cpu().t().contiguous()
        return unpacked(words, bits, int(self.shape[-1])).float()

    def dequantised(self, start: int, stop: int) -> Any:
        import torch

        columns = int(self.shape[-1])
        first, last = start // columns, -(-stop // columns)
        places = torch.arange(columns) // self.group if self.places is None else self.places[:].detach().cpu().long()
        values = (self.codes(first, last) - self.row_zeros(first, last)[:, places]) * self.row_scales(first, last)[
            :, places
        ]
        return values.reshape(-1)[start - first * columns : stop - first * columns]

    def row_scales(self, first: int, last: int) -> Any:
        return self.scales[:, first:last].detach().cpu().float().t()

    def row_zeros(self, first: int, last: int) -> Any:
        bits = int(self.code_bits)
        per_word = 32 // bits
        begin = first // per_word
        words = self.zeros[:, begin : -(-last // per_word)].detach().cpu().contiguous()
        zeros = unpacked(words, bits, 1 << 30)[:, first - begin * per_word :][:, : last - first]
        return (zeros.float() + self.offset).t()


class Gptq(Method):
    """Checkpoints of AutoGPTQ, GPTQModel and others."""

    name = "gptq"
    summary = "Checkpoints of GPTQModel and AutoGPTQ: packed 2 to 8 bit."
    packages = ("gptqmodel", "optimum")
    imports = ("gptqmodel", "optimum.gptq")
    file_methods = ("gptq",)
    phases = (
        ("gptqmodel.utils.model", ("convert_gptq_v1_to_v2_format", "gptqmodel_post_init"), "convert"),
        ("gptqmodel.nn_modules", ("post_init",), "convert"),
        ("optimum.gptq.quantizer", ("post_init_model",), "convert"),
    )
    runs_on = "CPU, GPU"
    held_as = "int32 buffers `qweight`, `qzeros`, `scales`, `g_idx`; kernels repack them in the first forward"
    proved = (
        "scales are the file's; a block dequantised from the module equals that of the file, whose zero points are "
    )
    proved += "one lower in version 1"

    def read(self, module: Any) -> Iterable[Stored]:
        tensors = {**module._parameters, **module._buffers}
        bits = int(getattr(module, "bits", 0) or 4)
        if tensors.get("qweight") is None or tensors.get("qzeros") is None or tensors.get("scales") is None:
            return
        if is_awq(tensors, getattr(module, "in_features", None)):
            return
        # GPTQModel adds the 1 of version 1 to the zero points while it loads (``convert_gptq_v1_to_v2_format``).
        yield stored_gptq(tensors, bits, 0, (getattr(module, "out_features", 0), getattr(module, "in_features", 0)))

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        if name != "weight" or not {"qweight", "qzeros", "scales"} <= set(tensors):
            return None
        offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        bits = int(config.get("bits", 4))
        rows, outputs = shape_of(tensors["qweight"])
        return stored_gptq(tensors, bits, offset, (outputs, rows * 32 // bits))


def stored_gptq(tensors: Mapping[str, Any], bits: int, offset: int, shape: tuple[int, int]) -> Stored:
    """Return the weight that the tensors of a module or a file hold."""
    places = tensors.get("g_idx")
    return StoredGptq(
        f"gptq-int{bits}",
        shape,
        tensors["qweight"],
        HOLDERS,
        scales=tensors["scales"],
        zeros=tensors["qzeros"],
        code_bits=bits,
        places=places if places is not None and shape_of(places)[0] == shape[1] else None,
        offset=offset,
    )


def is_awq(tensors: Mapping[str, Any], inputs: int | None) -> bool:
    """Return whether ``qweight`` is packed along the outputs, as AWQ does, and not along the inputs."""
    return inputs is not None and shape_of(tensors["qweight"])[0] == inputs and tensors.get("g_idx") is None
