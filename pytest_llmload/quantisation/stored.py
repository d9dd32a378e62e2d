"""How a weight is stored: the quantisation state behind it, wherever the library keeps it.

Nothing here imports bitsandbytes: what counts is the stored bytes and the state, not the class that holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

#: What the sixteen codes stand for (bitsandbytes/functional.py, ``get_4bit_type``).
_CODES = {
    "nf4": (
        *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
        *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@dataclass(frozen=True)
class Stored:
    """A quantised weight."""

    #: ``nf4``, ``fp4``, ``int8``: what the codes stand for.
    scheme: str
    #: The packed values.
    data: Any
    #: Shape of the weight that they stand for.
    shape: tuple[int, ...]
    #: Scales: one a block (4-bit) or a row (int8); uint8 where they are quantised themselves.
    scales: Any
    #: Values that the codes stand for; None for int8.
    code: Any = None
    blocksize: int = 0
    #: Statistics of the scales (``absmax``, ``code``, ``blocksize``) and their mean, with double quant.
    nested: Any = None
    offset: Any = None
    #: dtype that matrix products are computed in; empty where the module does not say.
    compute: str = ""
    #: What the state calls it, which is what kernels go by; empty where that is the scheme.
    label: str = ""
    #: int8: activations above it are computed in 16 bit.
    threshold: float = 0.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def describe(self) -> str:
        """``nf4 absmax=uint8 nested block=64 compute=bf16`` for the manifest."""
        if self.scheme == "int8":
            return f"int8 scale={dtype_name(self.scales)}" + (
                f" threshold={self.threshold:g}" if self.threshold else ""
            )
        parts = [self.scheme, f"absmax={dtype_name(self.scales)}"]
        parts += ["nested"] if self.nested is not None else []
        parts += [f"block={self.blocksize}"]
        parts += [f"compute={self.compute}"] if self.compute else []
        return " ".join(parts)


def dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def stored(module: Any, name: str) -> Stored | None:
    """The quantised weight ``name`` of a module; None where it is dense or its state is lost."""
    param = module._parameters.get(name)
    if param is None:
        return None
    state = _four_bit_state(module, name, param)
    if state is not None:
        label = str(state.quant_type)
        scheme = _scheme(state.code) or label
        return Stored(
            scheme=scheme,
            label=label if label != scheme else "",
            data=param,
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
    if scales is not None:
        threshold = float(getattr(getattr(module, "state", None), "threshold", 0.0) or 0.0)
        return Stored("int8", param, tuple(param.shape), scales, threshold=threshold)
    return None


def _scheme(code: Any) -> str:
    """The type whose values these are; empty for another one."""
    if code.device.type == "meta":
        return ""
    values = code.detach().cpu().double()
    for scheme, expected in _CODES.items():
        if values.shape == (16,) and torch.allclose(values, torch.tensor(expected, dtype=values.dtype), atol=1e-3):
            return scheme
    return ""


def _four_bit_state(module: Any, name: str, param: Any) -> Any:
    """A bitsandbytes ``QuantState``, by what it has: on the parameter, the module, or a parametrization.

    ``replace_parameter_4bit`` (bitsandbytes/nn/parametrize.py) keeps it on a child of the ``ParametrizationList`` that
    owns the packed values under the name ``original``.
    """
    places = [param]
    if not param.dtype.is_floating_point or vars(param):
        places.append(module)
    if name == "original":
        places += list(module.children())
    for place in places:
        state = vars(place).get("quant_state")
        if all(hasattr(state, part) for part in ("absmax", "code", "blocksize", "quant_type", "shape")):
            return state
    return None


def _row_scales(module: Any, param: Any) -> Any:
    """int8's scale of each row: on the parameter until the first forward, then in the module's state, or a buffer."""
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


def dequantised(weight: Stored, start: int, stop: int) -> Any:
    """Elements ``start`` to ``stop`` (row by row) of a quantised weight, fp32 on the CPU.

    Written from the format, not with the library's kernels, so that a kernel that is wrong does not judge itself.
    4-bit: two values a byte, the first in the high half; value = code[nibble] * absmax of its block; with double quant
    absmax = code2[absmax] * absmax2 of its block + offset (bitsandbytes/functional.py, ``quantize_4bit``).
    int8: value * scale of its row / 127 (``int8_vectorwise_dequant``).
    """
    index = torch.arange(start, stop)
    if weight.scheme == "int8":
        columns = weight.shape[-1]
        values = weight.data.detach().reshape(-1)[start:stop].cpu().float()
        scales = weight.scales.detach().reshape(-1)[start // columns : -(-stop // columns)].cpu().float()
        return values * scales[index // columns - start // columns] / 127
    packed = weight.data.detach().reshape(-1).view(torch.uint8)[start // 2 : (stop + 1) // 2].cpu()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[start % 2 :][: stop - start]
    return (
        weight.code.detach().cpu().float()[nibbles.long()]
        * _block_scales(weight, start, stop)[index // weight.blocksize - start // weight.blocksize]
    )


def _block_scales(weight: Stored, start: int, stop: int) -> Any:
    first, last = start // weight.blocksize, -(-stop // weight.blocksize)
    scales = weight.scales.detach().reshape(-1)[first:last].cpu()
    if weight.nested is None:
        return scales.float()
    size = int(weight.nested.blocksize)
    outer = weight.nested.absmax.detach()[first // size : -(-last // size)].cpu().float()
    outer = outer[torch.arange(first, last) // size - first // size]
    return weight.nested.code.detach().cpu().float()[scales.long()] * outer + float(weight.offset)
