"""Weights whose values are ``(code - zero) * scale``, with one scale and zero point per group of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pytest_llmload.quantisation.base import Stored, dtype_name, shape_of

#: Room for the rounding of a weight and its scale to 16 bit, relative to the largest value of a row.
_ROUNDING = 0.006


@dataclass(frozen=True, eq=False)
class Grouped(Stored):
    """Codes by row, with scales of shape rows x groups. A method's subclass says how its codes are packed.

    A weight of more than two dimensions is taken as a matrix of its rows: experts x outputs x inputs has experts x
    outputs of them.
    """

    #: Rows x groups, or rows x 1.
    scales: Any = None
    #: As ``scales``; None if the codes are symmetric.
    zeros: Any = None
    #: Bits of a code.
    code_bits: float = 8.0
    #: Further words for the manifest, such as ``act-order``.
    flags: tuple[str, ...] = ()
    #: The code of a row's or group's largest value if the scale is chosen by it alone; 0 if it is not.
    largest_code: float = 0.0

    @property
    def bits(self) -> float:
        return self.code_bits

    @property
    def group(self) -> int:
        """Return the number of elements of a row that share a scale."""
        return int(self.shape[-1]) // int(self.scales.shape[-1])

    @property
    def max_error(self) -> float | None:
        # Half a step; a step is at most the range of the values, twice their largest, over the number of steps.
        return 1 / (2**self.code_bits - 2) + _ROUNDING

    def describe(self) -> str:
        """Return the entry for the manifest: ``torchao-int8 scale=float32 group=256``."""
        return " ".join([self.scheme, f"scale={dtype_name(self.scales)}", f"group={self.group}", *self.flags])

    def statistics(self) -> Iterator[tuple[str, Any]]:
        yield "scales", self.scales
        if self.zeros is not None and self.zeros.is_floating_point():
            yield "zero points", self.zeros

    def codes(self, first: int, last: int) -> Any:
        """Return the codes of rows ``first`` to ``last`` as float32 on the CPU, rows x columns."""
        return _rows(self.data, first, last)

    def row_scales(self, first: int, last: int) -> Any:
        """Return the scales of rows ``first`` to ``last`` as float32 on the CPU, rows x groups."""
        return _rows(self.scales, first, last)

    def row_zeros(self, first: int, last: int) -> Any:
        """Return the zero points of rows ``first`` to ``last`` as float32 on the CPU; None if there are none."""
        return None if self.zeros is None else _rows(self.zeros, first, last)

    def dequantised(self, start: int, stop: int) -> Any:
        columns = int(self.shape[-1])
        first, last = start // columns, -(-stop // columns)
        values, zeros = self.codes(first, last), self.row_zeros(first, last)
        if zeros is not None:
            values = values - zeros.repeat_interleave(columns // zeros.shape[-1], dim=-1)
        scales = self.row_scales(first, last)
        values = values * scales.repeat_interleave(columns // scales.shape[-1], dim=-1)
        return values.reshape(-1)[start - first * columns : stop - first * columns]

    def rounded(self, values: Any) -> Any:
        """Return each group scaled by its largest value, each element rounded to the nearest code."""
        if not self.largest_code:
            return None
        groups = values.reshape(-1, self.group)
        scales = groups.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / self.largest_code
        highest = 2 ** (self.code_bits - 1)
        return ((groups / scales).round().clamp(-highest, highest - 1) * scales).reshape(values.shape)


def _rows(tensor: Any, first: int, last: int) -> Any:
    """Return rows of a tensor, or of a lazy slice of a matrix, as float32 on the CPU."""
    matrix = tensor if len(shape_of(tensor)) == 2 else tensor.reshape(-1, tensor.shape[-1])
    return matrix[first:last].detach().cpu().float()


#: The largest value of float8_e4m3fn, and half of the gap below it relative to it.
_E4M3_MAX, _E4M3_ERROR = 448.0, 16 / 448


@dataclass(frozen=True, eq=False)
class StackedGroups(Grouped):
    """Groups of a stated size that lie below each other: one row of ``data`` holds the bytes of one or more groups.

    Scales and zero points have one element per group, in any shape.
    """

    #: Elements of a row that share a scale.
    group_size: int = 64

    @property
    def group(self) -> int:
        return self.group_size

    def row_scales(self, first: int, last: int) -> Any:
        return self._by_row(self.scales, first, last)

    def row_zeros(self, first: int, last: int) -> Any:
        return None if self.zeros is None else self._by_row(self.zeros, first, last)

    def packed(self, first: int, last: int) -> tuple[Any, Any]:
        """Return the bytes that hold the groups of rows ``first`` to ``last``, and each group's place in its bytes.

        Both are int32: groups x elements, and groups x 1, where 0 is the place of the first group of a row of ``data``.
        """
        import torch

        groups = int(self.shape[-1]) // self.group_size
        index = torch.arange(first * groups, last * groups)
        rows = self.data.shape[0]
        return self.data.detach().cpu()[index % rows].int(), (index // rows).int().unsqueeze(-1)

    def _by_row(self, values: Any, first: int, last: int) -> Any:
        return values.detach().cpu().float().reshape(-1, int(self.shape[-1]) // self.group_size)[first:last]


@dataclass(frozen=True, eq=False)
class GroupedFloat8(Grouped):
    """Codes in float8_e4m3fn, each group scaled to the type's largest value."""

    @property
    def max_error(self) -> float | None:
        return _E4M3_ERROR + _ROUNDING

    def rounded(self, values: Any) -> Any:
        import torch

        groups = values.reshape(-1, self.group)
        scales = groups.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / _E4M3_MAX
        return ((groups / scales).to(torch.float8_e4m3fn).float() * scales).reshape(values.shape)


def unpacked(words: Any, bits: int, count: int) -> Any:
    """Return the first ``count`` values of ``bits`` each in the last dimension of int32 words, lowest bits first.

    It holds for 2, 4 and 8 bits, which do not cross words.
    """
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.reshape(*words.shape[:-1], -1)[..., :count]
