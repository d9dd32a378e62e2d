"""compressed-tensors: packed integers, int8 or float8 beside their scales, in the place of a Linear's weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_llmload.quantisation.base import Method, Stored, shape_of
from pytest_llmload.quantisation.grouped import Grouped, unpacked

_PREFIX = "compressed-tensors-"
#: Bits of a code that do not cross the words they are packed in.
_PLAIN_BITS = (2, 4, 8)


@dataclass(frozen=True, eq=False)
class StoredPacked(Grouped):
    """``weight_packed``: codes plus half of their range, lowest bits first in int32 (``pack_to_int32``)."""

    def codes(self, first: int, last: int) -> Any:
        bits = int(self.code_bits)
        if bits not in _PLAIN_BITS:
            raise NotImplementedError(f"compressed-tensors packs {bits} bits across words")
        words = self.data[first:last].detach().cpu()
        return unpacked(words, bits, int(self.shape[-1])).float() - 2 ** (bits - 1)

    def kept(self) -> dict[str, Any]:
        return {"weight_packed": self.data, "weight_scale": self.scales}


@dataclass(frozen=True, eq=False)
class StoredPlain(Grouped):
    """``weight`` in int8 or float8."""

    def kept(self) -> dict[str, Any]:
        return {"weight": self.data, "weight_scale": self.scales}


class CompressedTensors(Method):
    """Checkpoints of llm-compressor and others."""

    name = "compressed-tensors"
    summary = "Checkpoints of llm-compressor: packed int4 and int8, float8."
    packages = ("compressed_tensors",)
    imports = ("compressed_tensors",)
    file_methods = ("compressed-tensors", "compressed_tensors")
    phases = (("compressed_tensors.compressors", (), "convert"), ("compressed_tensors.quantization", (), "convert"))
    runs_on = "CPU, GPU: transformers makes the whole model dense in its first forward"
    held_as = "`weight_packed` and `weight_scale` until the first forward"
    proved = "values and scales are the file's; that it still serves packed after the first forward"

    def read(self, module: Any) -> Iterable[Stored]:
        weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if weights is None:
            return
        found = _stored(module._parameters, f"{weights.type}".rpartition(".")[2].lower(), int(weights.num_bits))
        if found is not None:
            yield found

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        groups = config.get("config_groups")
        scheme = next((group.get("weights") for group in groups.values()), None) if isinstance(groups, dict) else None
        if not scheme or name != "weight":
            return None
        return _stored(tensors, str(scheme.get("type", "int")), int(scheme.get("num_bits", 8)))

    def why_dense(self, module: Any) -> str:
        if getattr(module, "quantization_scheme", None) is not None:
            return "compressed-tensors decompressed it"
        return ""


def _stored(tensors: Mapping[str, Any], kind: str, bits: int) -> Stored | None:
    scheme = f"{_PREFIX}{'fp' if kind == 'float' else 'int'}{bits}"
    scales, zeros = tensors.get("weight_scale"), tensors.get("weight_zero_point")
    packed, plain = tensors.get("weight_packed"), tensors.get("weight")
    if packed is not None and scales is not None:
        words = shape_of(packed)
        columns = words[-1] * 32 // bits
        shape = tensors.get("weight_shape")
        if shape is not None:
            columns = int(shape[:][-1])
        holders = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        # Zero points of packed weights are packed too, along the other dimension.
        return StoredPacked(
            scheme,
            (*words[:-1], columns),
            packed,
            holders,
            scales=scales,
            code_bits=bits,
            flags=("zero-points",) if zeros is not None else (),
        )
    if plain is None or scales is None or not _is_one_byte(plain):
        return None
    names = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
    return StoredPlain(scheme, shape_of(plain), plain, names, scales=scales, zeros=zeros, code_bits=bits)


def _is_one_byte(tensor: Any) -> bool:
    """Return whether a tensor, of the model or of a file, is in int8, uint8 or float8: one code in each element."""
    name = str(tensor.get_dtype() if hasattr(tensor, "get_dtype") else tensor.dtype)
    return name in ("I8", "U8", "F8_E4M3", "F8_E5M2") or "int8" in name or "float8" in name
