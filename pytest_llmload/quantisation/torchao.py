"""torchao: tensor subclasses in the place of a Linear's weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_llmload.quantisation.base import FileFormat, Method, Scheme, Stored, shape_of
from pytest_llmload.quantisation.grouped import Grouped, GroupedFloat8

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

INT8, INT8_DYNAMIC, FP8, INT4 = "torchao-int8", "torchao-int8-dynamic", "torchao-fp8", "torchao-int4"
#: The configs of torchao.quantization that ask for a scheme.
_CONFIGS = {
    INT8: "Int8WeightOnlyConfig",
    INT8_DYNAMIC: "Int8DynamicActivationInt8WeightConfig",
    FP8: "Float8WeightOnlyConfig",
    INT4: "Int4WeightOnlyConfig",
}
#: The code of a group's largest value: symmetric scales are absmax / ((max - min) / 2), -128 to 127.
_INT8_LARGEST = 127.5


#: Bytes beside the values of a row: int8 has a float32 scale and an int8 zero point, float8 a scale. int4 has both in
#: the weight's own type for a group of 128.
_BESIDE_A_ROW = {INT8: 5, INT8_DYNAMIC: 5, FP8: 4}
_INT4_GROUP = 128


def _in_file(name: str, **parts: Any) -> dict[str, Any]:
    """Return the tensors inside a subclass by the names that ``save_pretrained`` gives them in a file."""
    return {f"_{name}_{part}": tensor for part, tensor in parts.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class StoredInteger(Grouped):
    """Int8Tensor and IntxUnpackedToInt8Tensor: a code in each byte."""

    def kept(self) -> dict[str, Any]:
        return _in_file(self.name, qdata=self.data, scale=self.scales, zero_point=self.zeros)


@dataclass(frozen=True, eq=False)
class StoredFloat8(GroupedFloat8):
    """Float8Tensor with a scale for each row."""

    def kept(self) -> dict[str, Any]:
        return _in_file(self.name, qdata=self.data, scale=self.scales)


@dataclass(frozen=True, eq=False)
class StoredOpaque(Stored):
    """A subclass whose packing belongs to a kernel: counted and named, its values are not read."""

    code_bits: float = 4.0

    @property
    def bits(self) -> float:
        return self.code_bits

    def describe(self) -> str:
        return self.scheme

    def kept(self) -> dict[str, Any]:
        return _in_file(self.name, qdata=self.data)


class TorchAO(Method):
    """Subclasses that torchao's own quantize_ makes, called by transformers or by a user's loader."""

    name = "torchao"
    summary = "Tensor subclasses of torchao: int8, float8 and int4, quantised while loading or by a loader."
    schemes = (
        Scheme(INT8, "torchao's Int8WeightOnlyConfig: weights in 8 bit.", 8),
        Scheme(INT8_DYNAMIC, "torchao's Int8DynamicActivationInt8WeightConfig: weights and activations in 8 bit.", 8),
        Scheme(FP8, "torchao's Float8WeightOnlyConfig: weights in float8_e4m3fn.", 8),
        Scheme(INT4, "torchao's Int4WeightOnlyConfig: weights in 4 bit; needs a GPU.", 4, packages=("mslk",)),
    )
    packages = ("torchao",)
    imports = (
        "torchao.quantization",
        "torchao.quantization.qat.affine_fake_quantized_tensor",
        "transformers.integrations.torchao",
    )
    file_methods = ("torchao",)
    phases = (("torchao.quantization", (), "convert"),)
    runs_on = "CPU, GPU (int4: GPU)"
    held_as = "tensors inside a subclass of Tensor, whose own size is that of the dense weight"
    proved = "type, bytes; blocks of int8, float8 and intx against the checkpoint's values, or its own codes and scales"

    def config(self, job: Job, scheme: str, skips: tuple[str, ...]) -> Any:
        import torchao.quantization
        from transformers import TorchAoConfig

        kind = getattr(torchao.quantization, _CONFIGS[scheme])()
        return TorchAoConfig(kind, modules_to_not_convert=list(skips) or None)

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        """Return the bytes as ``Int8Tensor``, ``Float8Tensor`` and ``Int4Tensor`` of torchao/quantization keep them."""
        scheme = {name: scheme for scheme, name in _CONFIGS.items()}.get(type(config.quant_type).__name__)
        if not replaced or scheme is None:
            return None
        if scheme == INT4:
            groups = weight.numel() // int(getattr(config.quant_type, "group_size", _INT4_GROUP))
            return {".qdata": weight.numel() // 2, ".scales": 2 * groups * weight.element_size()}
        return {".qdata": weight.numel(), ".scale": weight.shape[0] * _BESIDE_A_ROW[scheme]}

    def read(self, module: Any) -> Iterable[Stored]:
        for name, param in module._parameters.items():
            if type(param).__module__.partition(".")[0] == "torchao" and hasattr(param, "qdata"):
                yield _stored(name, param)

    def described(self, config: Mapping[str, Any]) -> FileFormat | None:
        found, kind = super().described(config), _kind(config)
        if found is None or not kind:
            return found
        scheme = next((scheme for scheme, name in _CONFIGS.items() if name == kind), "")
        return replace(found, scheme=scheme, description=scheme or f"{self.name} {kind}")

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        data, scales, zeros = (tensors.get(f"_{name}_{part}") for part in ("qdata", "scale", "zero_point"))
        if data is None or scales is None or len(shape_of(data)) != 2 or "Int4" in _kind(config):
            # The order of 4-bit values on a GPU is a kernel's.
            return None
        kind = GroupedFloat8 if data.get_dtype().startswith("F8") else Grouped
        return kind(self.name, shape_of(data), data, name=name, scales=scales, zeros=zeros)


def _kind(config: Mapping[str, Any]) -> str:
    """Return the class of torchao.quantization that a checkpoint's config names: ``Int8WeightOnlyConfig``; else empty.

    transformers writes it as ``{"default": {"_type": "Int8WeightOnlyConfig", …}}``.
    """
    asked = config.get("quant_type")
    asked = asked.get("default") if isinstance(asked, dict) else None
    return str(asked.get("_type", "")) if isinstance(asked, dict) else ""


def _stored(name: str, tensor: Any) -> Stored:
    kind = type(tensor).__name__
    common: dict[str, Any] = {"shape": tuple(tensor.shape), "data": tensor.qdata, "holders": (name,), "name": name}
    if kind == "Int8Tensor":
        dynamic = tensor.act_quant_kwargs is not None
        zeros = tensor.zero_point
        return StoredInteger(
            INT8_DYNAMIC if dynamic else INT8,
            **common,
            scales=tensor.scale,
            zeros=zeros,
            largest_code=0.0 if tensor.reduce_range else _INT8_LARGEST,
        )
    if kind == "Float8Tensor" and tensor.scale.shape[:-1] == tensor.shape[:-1]:
        return StoredFloat8(FP8, **common, scales=tensor.scale)
    if kind == "IntxUnpackedToInt8Tensor":
        bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
        return StoredInteger(
            f"torchao-intx{bits}",
            **common,
            scales=tensor.scale,
            zeros=tensor.zero_point,
            code_bits=bits,
            flags=("held=8bit",) if bits != 8 else (),
        )
    bits = 4 if "4" in kind.partition("Tensor")[0] else 8
    return StoredOpaque(INT4 if kind == "Int4Tensor" or "Int4" in kind else f"torchao-{kind}", **common, code_bits=bits)
