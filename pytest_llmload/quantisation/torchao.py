"""torchao: tensor subclasses in the place of a Linear's weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmload.quantisation.base import Method, Scheme, Stored
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


@dataclass(frozen=True, eq=False)
class StoredOpaque(Stored):
    """A subclass whose packing belongs to a kernel: counted and named, its values are not read."""

    code_bits: float = 4.0

    @property
    def bits(self) -> float:
        return self.code_bits

    def describe(self) -> str:
        return self.scheme


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
    proved = "type, bytes; blocks of int8, float8 and intx dequantised against the checkpoint's values"

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


def _stored(name: str, tensor: Any) -> Stored:
    kind = type(tensor).__name__
    common: dict[str, Any] = {"shape": tuple(tensor.shape), "data": tensor.qdata, "holders": (name,), "name": name}
    if kind == "Int8Tensor":
        dynamic = tensor.act_quant_kwargs is not None
        zeros = tensor.zero_point
        return Grouped(
            INT8_DYNAMIC if dynamic else INT8,
            **common,
            scales=tensor.scale,
            zeros=zeros,
            largest_code=0.0 if tensor.reduce_range else _INT8_LARGEST,
        )
    if kind == "Float8Tensor" and tensor.scale.shape[:-1] == tensor.shape[:-1]:
        return GroupedFloat8(FP8, **common, scales=tensor.scale)
    if kind == "IntxUnpackedToInt8Tensor":
        bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
        return Grouped(
            f"torchao-intx{bits}",
            **common,
            scales=tensor.scale,
            zeros=tensor.zero_point,
            code_bits=bits,
            flags=("held=8bit",) if bits != 8 else (),
        )
    bits = 4 if "4" in kind.partition("Tensor")[0] else 8
    return StoredOpaque(INT4 if kind == "Int4Tensor" or "Int4" in kind else f"torchao-{kind}", **common, code_bits=bits)
