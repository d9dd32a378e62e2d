"""HQQ: HQQLinear, whose scales and zero points are in a dict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmload.quantisation.base import Method, Scheme, Stored
from pytest_llmload.quantisation.grouped import StackedGroups

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

#: Bits -> values a byte, the first of them in the high bits (hqq/core/bitpack.py).
_PER_BYTE = {8: 1, 4: 2, 2: 4, 1: 8}


@dataclass(frozen=True, eq=False)
class StoredHqq(StackedGroups):
    """Groups below each other: byte i of a column has the groups i, i + n/2 … of n, the first in the high bits."""

    @property
    def max_error(self) -> float | None:
        # Scale and zero point are optimised for the mean, so that single values may lie outside their range.
        return None

    def codes(self, first: int, last: int) -> Any:
        bits = int(self.code_bits)
        if bits not in _PER_BYTE:
            raise NotImplementedError(f"HQQ packs {bits} bits across bytes")
        packed, place = self.packed(first, last)
        return ((packed >> (8 - bits * (place + 1))) & (2**bits - 1)).float().reshape(last - first, -1)


@dataclass(frozen=True, eq=False)
class StoredHqqOpaque(Stored):
    """Groups along the other axis, scales that are quantised themselves, or three bits: counted and named."""

    code_bits: float = 4.0
    group_size: int = 64

    @property
    def bits(self) -> float:
        return self.code_bits

    def describe(self) -> str:
        return f"{self.scheme} group={self.group_size}"


class Hqq(Method):
    """Modules that hqq made in a loader."""

    name = "hqq"
    summary = "Half-quadratic quantisation to 1 to 8 bit, by a loader."
    schemes = (Scheme("hqq", "HQQ with 4 bit and groups of 64, where the installed transformers can.", 4),)
    packages = ("hqq",)
    imports = ("hqq.core.quantize",)
    file_methods = ("hqq",)
    phases = (("hqq.core.quantize", ("quantize",), "convert"), ("hqq.core.optimize", (), "convert"))
    cache_backends = ("hqq",)
    runs_on = "CPU, GPU"
    held_as = "uint8 in W_q; scales and zero points in a dict of the module"
    proved = "type, bytes; a block dequantised from the format equals the library's own"

    def config(self, job: Job, scheme: str, skips: tuple[str, ...]) -> Any:
        import transformers
        from transformers.quantizers.base import HfQuantizer
        from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

        # transformers 5 quantises by such an operation; 4 did in create_quantized_param.
        declared = getattr(HfQuantizer, "get_quantize_ops", None)
        if declared is not None and HqqHfQuantizer.get_quantize_ops is declared:
            raise NotImplementedError(
                f"transformers {transformers.__version__} has HqqConfig, but no operation that quantises with it "
                "(from_pretrained raises NotImplementedError); quantise in a loader of your own, with hqq's "
                "AutoHQQHFModel.quantize_model"
            )
        if job.device.kind == "cpu":
            raise NotImplementedError(f"transformers {transformers.__version__} refuses HqqConfig on a CPU")
        return transformers.HqqConfig(nbits=4, group_size=64, **({"skip_modules": list(skips)} if skips else {}))

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        """Return the bytes of ``W_q``, and of a scale and a zero point for each group, in the type of the weight."""
        asked = config.quant_config.get("weight_quant_params", {}) if isinstance(config.quant_config, dict) else {}
        bits, group = asked.get("nbits"), asked.get("group_size")
        if not replaced or bits not in (*_PER_BYTE, 3) or not group or asked.get("axis", 1) != 1:
            return None
        groups = weight.numel() // group
        # Ten groups of three bits below each other make one of 32.
        packed = -(-groups // 10) * group * 4 if bits == 3 else weight.numel() // _PER_BYTE[bits]
        scales = groups * weight.element_size()
        return {".W_q": packed, ".scale": scales, ".zero": scales}

    def read(self, module: Any) -> Iterable[Stored]:
        packed, meta = module._parameters.get("W_q"), vars(module).get("meta")
        if packed is None or not isinstance(meta, dict) or "nbits" not in meta:
            return
        bits, group, shape = int(meta["nbits"]), int(meta["group_size"] or meta["shape"][-1]), tuple(meta["shape"])
        common: dict[str, Any] = {
            "scheme": "hqq" if bits == 4 else f"hqq-int{bits}",
            "shape": shape,
            "data": packed,
            "holders": ("W_q",),
            "code_bits": bits,
            "group_size": group,
        }
        plain = meta.get("axis") == 1 and "scale" in meta and "zero" in meta and not meta.get("view_as_float")
        if plain and bits in _PER_BYTE:
            yield StoredHqq(scales=meta["scale"], zeros=meta["zero"], **common)
        else:
            yield StoredHqqOpaque(**common)
