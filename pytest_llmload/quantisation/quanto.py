"""optimum-quanto: QLinear, whose weight is a tensor subclass with another one inside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmload.quantisation.base import Method, Scheme, Stored
from pytest_llmload.quantisation.grouped import Grouped, GroupedFloat8, StackedGroups

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

_PREFIX = "quanto-"
#: A scheme -> the name of its weights in QuantoConfig.
_WEIGHTS = {"quanto-int8": "int8", "quanto-int4": "int4", "quanto-int2": "int2", "quanto-fp8": "float8"}
_NAMES = {"qint8": "int8", "qint4": "int4", "qint2": "int2", "qfloat8_e4m3fn": "fp8", "qfloat8": "fp8"}


@dataclass(frozen=True, eq=False)
class StoredQBits(StackedGroups):
    """WeightQBitsTensor: groups of a row below each other, two or four to a byte, ``code * scale - shift``.

    ``pack_weights`` of optimum/quanto/tensor/packed.py: byte i of a column has the groups i, i + n/2 (int4) or i,
    i + n/4, i + n/2, i + 3n/4 (int2), lowest bits first.
    """

    def codes(self, first: int, last: int) -> Any:
        bits = int(self.code_bits)
        packed, place = self.packed(first, last)
        return ((packed >> (place * bits)) & (2**bits - 1)).float().reshape(last - first, -1)

    def row_zeros(self, first: int, last: int) -> Any:
        """Return the zero points of rows as codes: a shift is in units of the weight; an integer one is a code."""
        zeros = super().row_zeros(first, last)
        return zeros / self.row_scales(first, last) if self.zeros.is_floating_point() else zeros


@dataclass(frozen=True, eq=False)
class StoredTinyGemm(StackedGroups):
    """TinyGemmWeightQBitsTensor: 4 bit in the order of a kernel, which is not documented; values are not read."""

    @property
    def max_error(self) -> float | None:
        return None

    def dequantised(self, start: int, stop: int) -> Any:
        raise NotImplementedError("the order of tinygemm's packed values is not documented")


class Quanto(Method):
    """Modules that quanto made for QuantoConfig, or for ``quantize`` and ``freeze`` in a loader."""

    name = "optimum-quanto"
    summary = "int8, int4, int2 and float8 weights of optimum-quanto, quantised while loading or by a loader."
    schemes = (
        Scheme("quanto-int8", "optimum-quanto: weights in 8 bit, one scale a row.", 8),
        Scheme("quanto-int4", "optimum-quanto: weights in 4 bit, groups of 128.", 4),
        Scheme("quanto-int2", "optimum-quanto: weights in 2 bit, groups of 128.", 2),
        Scheme("quanto-fp8", "optimum-quanto: weights in float8_e4m3fn.", 8),
    )
    packages = ("optimum.quanto",)
    imports = (
        "optimum.quanto",
        *(f"optimum.quanto.tensor.weights.{name}" for name in ("awq", "marlin", "tinygemm")),
        "transformers.integrations.quanto",
    )
    file_methods = ("quanto",)
    phases = (("optimum.quanto.quantize", ("quantize", "freeze", "requantize"), "convert"),)
    cache_backends = ("quanto", "")
    runs_on = "CPU, GPU"
    held_as = "tensors inside a subclass, which for int4 and int2 is inside a second one"
    proved = (
        "type, bytes; blocks of int8, float8 and int2 dequantised against the checkpoint's values; int4's order of "
    )
    proved += "values belongs to a kernel"

    def config(self, job: Job, scheme: str, skips: tuple[str, ...]) -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=_WEIGHTS[scheme], modules_to_not_convert=list(skips) or None)

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        """Return the bytes as optimum/quanto/tensor/weights keeps them: a scale a row, or a scale and a shift a group.

        They are of the weight's own type; the module, which quanto has made, says which group.
        """
        kind = getattr(module, "weight_qtype", None)
        if not replaced or kind is None:
            return None
        rows, group, size = weight.shape[0], module.weight_group_size, weight.element_size()
        packed = weight.numel() * kind.bits // 8
        if kind.bits == 8:
            return {"._data": packed, "._scale": rows * size}
        groups = weight.numel() // group if group else rows
        return {"._data": packed, "._scale": groups * size, "._shift": groups * size}

    def read(self, module: Any) -> Iterable[Stored]:
        for name, param in module._parameters.items():
            if type(param).__module__.startswith("optimum.quanto") and hasattr(param, "_qtype"):
                yield _stored(name, param)


def _stored(name: str, tensor: Any) -> Stored:
    kind = tensor._qtype
    scheme = _PREFIX + _NAMES.get(kind.name, kind.name)
    common: dict[str, Any] = {
        "shape": tuple(tensor.shape),
        "holders": (name, "input_scale", "output_scale"),
        "name": name,
        "code_bits": kind.bits,
    }
    if hasattr(tensor, "_scale_shift"):
        packed = tensor._data._data
        scales = tensor._scale_shift[..., 0]
        return StoredTinyGemm(scheme, data=packed, scales=scales, group_size=tensor._group_size, **common)
    if hasattr(tensor, "_shift"):
        return StoredQBits(
            scheme,
            data=tensor._data._data,
            scales=tensor._scale,
            zeros=tensor._shift,
            group_size=tensor._group_size or tensor.shape[-1],
            **common,
        )
    rows: dict[str, Any] = {"data": tensor._data, "scales": tensor._scale, **common}
    # WeightQBytesTensor: one scale a row.
    return GroupedFloat8(scheme, **rows) if kind.is_floating_point else Grouped(scheme, largest_code=kind.qmax, **rows)
