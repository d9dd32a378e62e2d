"""bitsandbytes: int8, nf4 and fp4, quantised while the model is loaded.

Reading a weight imports nothing of bitsandbytes: the stored bytes and the state count, not the class that holds them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.dtypes import SHORT_NAMES, TORCH_NAMES
from pytest_llmload.core.units import counted, plural
from pytest_llmload.quantisation.base import (
    COMPUTE_DTYPE,
    DENSE_OK,
    DOUBLE_QUANT,
    SKIP_MODULES,
    FileFormat,
    Method,
    Request,
    Scheme,
    ServeFlag,
    Stored,
    dtype_name,
    named_skips,
)

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

INT8, NF4, FP4 = "int8", "nf4", "fp4"
#: The setting, of 4-bit schemes too, that keeps dense what a device map puts on the CPU or the disk.
_OFFLOAD = "llm_int8_enable_fp32_cpu_offload"
#: The values of the sixteen codes (bitsandbytes/functional.py, ``get_4bit_type``).
_CODES = {
    NF4: (
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ),
    FP4: tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
#: Half of the widest gap between two values of the type, relative to the block's or row's largest value, with room
#: for the rounding of weight and scale to 16 bit. NF4: -1 and -0.6962; FP4: 1 and 0.6667; int8: 1/127.
_MAX_ERROR = {NF4: 0.152 + 0.01, FP4: 0.167 + 0.01, INT8: 0.5 / 127 + 0.003}
#: 8-bit statistics of the scales, relative to the largest scale of their block.
_NESTED_ERROR = 0.05
#: Elements that a scale is shared by, and that kernels for the CPU process at once.
_BLOCK = 64
#: Entries of the code tables: 4-bit types, and the dynamic 8-bit type of nested statistics; scales to a block of these.
_CODE_4BIT, _CODE_8BIT, _NESTED_BLOCK = 16, 256, 256
_FP32 = 4
#: Rounds a number in fp32 to the nearest integer, ties to even, if it is added and taken away again. ``round()`` does
#: the same, but in all of torch's threads, whose start takes longer than a row.
_TO_INTEGER = 1.5 * 2**23
_FOUR_BIT_OPTIONS = (SKIP_MODULES, DENSE_OK, DOUBLE_QUANT, COMPUTE_DTYPE)


@dataclass(frozen=True, eq=False)
class StoredFourBit(Stored):
    """nf4 or fp4: two values a byte, the first in the high half."""

    #: One scale a block; uint8 where they are quantised themselves.
    scales: Any = None
    #: The values of the codes.
    code: Any = None
    blocksize: int = 0
    #: Statistics of the scales (``absmax``, ``code``, ``blocksize``) and their mean, with double quant.
    nested: Any = None
    offset: Any = None

    @property
    def block(self) -> int:
        return self.blocksize

    @property
    def bits(self) -> float:
        return 4.0

    @property
    def is_nested(self) -> bool:
        return self.nested is not None

    @property
    def max_error(self) -> float | None:
        return _MAX_ERROR.get(self.scheme)

    @property
    def scale_error(self) -> float:
        return _NESTED_ERROR if self.is_nested else 0.0

    def describe(self) -> str:
        """Return the entry for the manifest: ``nf4 absmax=uint8 nested block=64 compute=bf16``."""
        parts = [self.scheme, f"absmax={dtype_name(self.scales)}"]
        parts += ["nested"] if self.is_nested else []
        parts += [f"block={self.blocksize}"]
        parts += [f"compute={self.compute}"] if self.compute else []
        return " ".join(parts)

    def statistics(self) -> Iterator[tuple[str, Any]]:
        yield "scales", self.scales
        if self.nested is not None:
            yield "nested scales", self.nested.absmax
        yield "offset", self.offset

    def kept(self) -> dict[str, Any]:
        found = {self.name: self.data, f"{self.name}.absmax": self.scales}
        return found if self.nested is None else {**found, f"{self.name}.nested_absmax": self.nested.absmax}

    def dequantised(self, start: int, stop: int) -> Any:
        """Return the elements as value = code[nibble] * absmax of its block.

        With double quant, absmax = code2[absmax] * absmax2 of its block + offset (bitsandbytes/functional.py,
        ``quantize_4bit``).
        """
        import torch

        packed = self._bytes[start // 2 : (stop + 1) // 2].cpu()
        first, last = start // self.blocksize, -(-stop // self.blocksize)
        scales = self._block_scales(range(first, last))[torch.arange(start, stop) // self.blocksize - first]
        return self._codes[_nibbles(packed)[start % 2 :][: stop - start]] * scales

    def dequantised_blocks(self, numbers: Sequence[int]) -> Any:
        if self.elements < self.blocksize:
            return super().dequantised_blocks(numbers)
        size = self.blocksize // 2
        whole = self._bytes[: self.elements // self.blocksize * size].reshape(-1, size)
        codes = self._codes[_nibbles(whole[list(numbers)].cpu())].reshape(len(numbers), self.blocksize)
        return codes * self._block_scales(numbers)[:, None]

    @property
    def _bytes(self) -> Any:
        import torch

        return self.data.detach().reshape(-1).view(torch.uint8)

    @cached_property
    def _codes(self) -> Any:
        return self.code.detach().cpu().float()

    @cached_property
    def _nested_codes(self) -> Any:
        return self.nested.code.detach().cpu().float()

    @cached_property
    def _mean(self) -> float:
        return float(self.offset)

    def _block_scales(self, numbers: Sequence[int]) -> Any:
        scales = self.scales.detach().reshape(-1)[list(numbers)].cpu()
        if self.nested is None:
            return scales.float()
        size = int(self.nested.blocksize)
        outer = self.nested.absmax.detach()[[number // size for number in numbers]].cpu().float()
        return self._nested_codes[scales.long()] * outer + self._mean

    def rounded(self, values: Any) -> Any:
        """Return each block scaled by its largest value, each element rounded to the nearest code."""
        import torch

        if self.scheme not in _CODES:
            return None
        # A weight may have fewer elements than a block.
        blocks = values.reshape(-1, min(self.blocksize, values.numel()))
        scales = blocks.abs().amax(dim=1, keepdim=True)
        code = torch.tensor(sorted(_CODES[self.scheme]), device=values.device)
        nearest = torch.bucketize(blocks / scales.clamp_min(1e-30), (code[1:] + code[:-1]) / 2)
        return (code[nearest] * scales).reshape(values.shape)

    def differences(self, request: Request) -> Iterator[str]:
        if request.double_quant and not self.is_nested:
            yield f"double quant was requested, but the statistics are plain {dtype_name(self.scales)}"
        if not request.double_quant and not request.may_nest and self.is_nested:
            yield "the statistics are quantised, but double quant was not requested"
        if request.compute and self.compute != request.compute:
            yield f"compute dtype {request.compute} was requested, but {self.compute or 'none'} is set"


@dataclass(frozen=True, eq=False)
class StoredInt8(Stored):
    """LLM.int8(): one value a byte, one scale a row."""

    #: One scale a row.
    scales: Any = None
    #: Activations above it are computed in 16 bit.
    threshold: float = 0.0

    @property
    def max_error(self) -> float | None:
        return _MAX_ERROR[self.scheme]

    @property
    def bits(self) -> float:
        return 8.0

    def describe(self) -> str:
        """Return the entry for the manifest: ``int8 scale=float32 threshold=6``."""
        threshold = f" threshold={self.threshold:g}" if self.threshold else ""
        return f"{self.scheme} scale={dtype_name(self.scales)}{threshold}"

    def statistics(self) -> Iterator[tuple[str, Any]]:
        yield "scales", self.scales

    def kept(self) -> dict[str, Any]:
        return {self.name: self.data, "SCB": self.scales}

    def dequantised(self, start: int, stop: int) -> Any:
        """Return the elements as value * scale of its row / 127 (``int8_vectorwise_dequant``)."""
        columns = self.shape[-1]
        first, last = start // columns, -(-stop // columns)
        values = self.data.detach().reshape(-1)[start:stop].cpu().float()
        scales = self.scales.detach().reshape(-1)[first:last].cpu().float()
        # Not by an index of each element: torch divides integers in all of its threads, whose start takes longer.
        each = scales[:, None].expand(-1, columns).reshape(-1)
        return values * each[start - first * columns : stop - first * columns] / 127

    def dequantised_blocks(self, numbers: Sequence[int]) -> Any:
        rows = list(numbers)
        values = self.data.detach().reshape(-1, self.shape[-1])[rows].cpu().float()
        return values * self.scales.detach().reshape(-1)[rows].cpu().float()[:, None] / 127

    def rounded(self, values: Any) -> Any:
        """Return each row scaled by its largest value, in fp16 as in the library (``int8_vectorwise_quant``)."""
        rows = values.reshape(-1, self.shape[-1])
        scales = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        return ((rows * (127 / scales) + _TO_INTEGER - _TO_INTEGER) * (scales / 127)).reshape(values.shape)


class BitsAndBytes(Method):
    """int8, nf4 and fp4."""

    name = "bitsandbytes"
    summary = "int8 with 16-bit outliers, and the 4-bit types nf4 and fp4, quantised while loading."
    schemes = (
        Scheme(
            INT8,
            "LLM.int8(): weights in 8 bit, outlier activations in 16 bit.",
            8,
            by_default=True,
            served=ServeFlag("bnb-8bit"),
        ),
        Scheme(
            NF4,
            "Weights in NormalFloat 4, with or without double quant.",
            4,
            options=_FOUR_BIT_OPTIONS,
            by_default=True,
            also=({"quant": NF4, "double_quant": True},),
            served=ServeFlag(
                "bnb-4bit",
                {"double_quant": True},
                "transformers serve has one 4-bit setting, nf4 with double quantisation",
            ),
        ),
        Scheme(FP4, "Weights in 4-bit floating point.", 4, options=_FOUR_BIT_OPTIONS, by_default=True),
    )
    packages = ("bitsandbytes",)
    imports = ("bitsandbytes", "transformers.integrations.bitsandbytes")
    file_methods = ("bitsandbytes",)
    transformers_names = ("bitsandbytes_4bit", "bitsandbytes_8bit")
    settings = (
        "llm_int8_threshold",
        _OFFLOAD,
        "llm_int8_has_fp16_weight",
        "bnb_4bit_quant_storage",
    )
    library = "libbitsandbytes"
    binary = "libbitsandbytes_{build}.so"
    binary_variable = "BNB_CUDA_VERSION"
    loggers = ("bitsandbytes",)
    peft_modules = ("peft.tuners.lora.bnb",)
    assumptions: ClassVar[Mapping[str, str]] = {
        "bitsandbytes.int8_vectorwise_quant": "no activation were above int8's threshold for outliers",
    }
    phases = (
        ("bitsandbytes.nn", ("_quantize", "from_prequantized"), "convert"),
        # Of a weight that is quantised already.
        ("bitsandbytes.functional", ("QuantState.to", "to"), "move"),
        ("bitsandbytes.functional", (), "convert"),
        ("bitsandbytes.backends", (), "convert"),
    )
    runs_on = "CPU, GPU"
    held_as = "packed values, scales and code tables in the quantisation state of each weight"
    proved = "type, bytes, double quant, compute dtype; blocks dequantised against the checkpoint's values"

    def config(self, job: Job, scheme: str, skips: tuple[str, ...]) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        spec = job.spec
        settings: dict[str, Any] = {name: spec.option(name) for name in self.settings if spec.option(name) is not None}
        if scheme == INT8:
            settings["load_in_8bit"] = True
        else:
            settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": scheme}
        if spec.double_quant:
            settings["bnb_4bit_use_double_quant"] = True
        if spec.compute_dtype:
            settings["bnb_4bit_compute_dtype"] = getattr(torch, TORCH_NAMES[spec.compute_dtype])
        if skips:
            settings["llm_int8_skip_modules"] = list(skips)
        return BitsAndBytesConfig(**settings)

    def keep_offloaded_dense(self, job: Job, config: Any) -> None:
        # Without it transformers refuses such a load.
        if job.spec.option(_OFFLOAD) is None:
            setattr(config, _OFFLOAD, True)

    def predicted(self) -> AbstractContextManager[None]:
        if self.name not in sys.modules:
            return nullcontext()
        from pytest_llmload.quantisation.bitsandbytes_predicted import allocating

        return allocating()

    def read(self, module: Any) -> Iterable[Stored]:
        for name, param in module._parameters.items():
            if param is not None and (found := _stored(module, name, param)) is not None:
                yield found

    def described(self, config: Mapping[str, Any]) -> FileFormat | None:
        four, eight = config.get("load_in_4bit"), config.get("load_in_8bit")
        if not four and not eight:
            return super().described(config)
        scheme = str(config.get("bnb_4bit_quant_type", FP4)) if four else INT8
        nested = bool(four and config.get("bnb_4bit_use_double_quant"))
        dtype = str(config.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        return FileFormat(
            self.name,
            f"{self.name} {scheme}" + (" with double quant" if nested else ""),
            scheme,
            nested,
            SHORT_NAMES.get(dtype, "") if four else "",
            named_skips(config),
            config,
        )

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        """Return the storages that bitsandbytes makes of a weight, as suffix of the weight's name -> bytes.

        For 4 bit, they follow ``quantize_4bit`` of bitsandbytes/functional.py; for int8, ``int8_vectorwise_quant``.
        """
        elements, kind = weight.numel(), type(weight).__name__
        if kind == "Params4bit":
            blocks = -(-elements // weight.blocksize)
            parts = {"": -(-elements // 2), ".code": _CODE_4BIT * _FP32}
            if not weight.compress_statistics:
                return {**parts, ".absmax": blocks * _FP32}
            return {
                **parts,
                ".absmax": blocks,
                ".offset": _FP32,
                ".state2.absmax": -(-blocks // _NESTED_BLOCK) * _FP32,
                ".state2.code": _CODE_8BIT * _FP32,
            }
        if kind == "Int8Params":
            held_dense = {"": elements * weight.element_size()}
            return held_dense if weight.has_fp16_weights else {"": elements, ".SCB": module.out_features * _FP32}
        return None

    def why_dense(self, module: Any) -> str:
        name = type(module).__name__
        if name in ("Linear4bit", "Linear8bitLt"):
            dtype = dtype_name(module.weight)
            return f"the module is a {name}, but its weight is a plain {dtype} tensor without quantisation state"
        return ""

    def hint(self, place: str, device: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
        if device != "cpu" or not place.startswith("bitsandbytes/"):
            return ""
        odd = [path for path, shape in shapes.items() if any(size % _BLOCK for size in shape)]
        if not odd:
            return ""
        return (
            f"bitsandbytes' kernels for the CPU need dimensions that are multiples of {_BLOCK}, its block; {len(odd)} "
            f"of {counted(len(shapes), 'weight')} {plural(len(odd), 'has', 'have')} others ({odd[0]} is "
            f"{' x '.join(map(str, shapes[odd[0]]))}): leave {plural(len(odd), 'it', 'them')} out with "
            "skip_modules=, or take a GPU"
        )


def _stored(module: Any, name: str, param: Any) -> Stored | None:
    import torch

    state = _four_bit_state(module, name, param)
    if state is not None:
        label = str(state.quant_type)
        scheme = scheme_of(state.code) or label
        return StoredFourBit(
            scheme=scheme,
            label=label if label != scheme else "",
            data=param,
            holders=(name,),
            name=name,
            shape=tuple(state.shape),
            scales=state.absmax,
            code=state.code,
            blocksize=int(state.blocksize),
            # Repacking for CPUs with AVX512-BF16, at the first forward, deletes these two.
            nested=getattr(state, "state2", None),
            offset=getattr(state, "offset", None),
            compute=str(getattr(module, "compute_dtype", None) or "").removeprefix("torch."),
        )
    scales = _row_scales(module, param) if param.dtype == torch.int8 else None
    if scales is None:
        return None
    threshold = float(getattr(getattr(module, "state", None), "threshold", 0.0) or 0.0)
    return StoredInt8(INT8, tuple(param.shape), param, (name,), name, scales=scales, threshold=threshold)


def _nibbles(packed: Any) -> Any:
    """Return the two codes of each byte, the high one first, in one row."""
    import torch

    return torch.stack((packed >> 4, packed & 15), dim=-1).reshape(-1).long()


def scheme_of(code: Any) -> str:
    """Return the type whose values a code table has; empty for a different one."""
    if code.device.type == "meta":
        return ""
    values = code.reshape(-1).tolist()
    for scheme, expected in _CODES.items():
        if len(values) == len(expected) and all(map(partial(math.isclose, abs_tol=1e-3), values, expected)):
            return scheme
    return ""


def _four_bit_state(module: Any, name: str, param: Any) -> Any:
    """Return a bitsandbytes ``QuantState``, known by its attributes: on the parameter, module or parametrization.

    ``replace_parameter_4bit`` (bitsandbytes/nn/parametrize.py) keeps it on a child of the ``ParametrizationList`` that
    owns the packed values under the name ``original``.
    """
    places = [param]
    # Packed values are a column; a bias beside them may have attributes too, which transformers sets.
    if param.dim() > 1 and (not param.dtype.is_floating_point or vars(param)):
        places.append(module)
    if name == "original":
        places += list(module.children())
    for place in places:
        state = vars(place).get("quant_state")
        if all(hasattr(state, part) for part in ("absmax", "code", "blocksize", "quant_type", "shape")):
            return state
    return None


def _row_scales(module: Any, param: Any) -> Any:
    """Return int8's scales of the rows.

    They are on the parameter until the first forward, then in the module's state or a buffer.
    """
    candidates = (
        vars(param).get("SCB"),
        getattr(getattr(module, "state", None), "SCB", None),
        *module._buffers.values(),
    )
    rows = param.shape[0]
    for scales in candidates:
        if scales is not None and scales.dtype.is_floating_point and scales.numel() == rows:
            return scales
    return None
