"""Fine-grained FP8: float8_e4m3fn with one scale a block of rows and columns, as DeepSeek's checkpoints have it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_llmload.quantisation.base import Method, Scheme, Stored, dtype_name, shape_of

if TYPE_CHECKING:
    from pytest_llmload.core.job import Job

FP8 = "fp8"
#: Half of the gap below the largest value, 448, relative to it, with room for the rounding of the weight to 16 bit.
_E4M3_ERROR = 16 / 448 + 0.006
_SCALES = "_scale_inv"


@dataclass(frozen=True, eq=False)
class StoredFp8(Stored):
    """``value * scale`` of the block of row and column; experts x rows x columns are one matrix after the other."""

    #: Blocks of rows x blocks of columns, after the experts.
    scales: Any = None
    #: Rows and columns of a block.
    sizes: tuple[int, int] = (128, 128)

    @property
    def bits(self) -> float:
        return 8.0

    @property
    def max_error(self) -> float | None:
        return _E4M3_ERROR

    def describe(self) -> str:
        """Return the entry for the manifest: ``fp8 scale=float32 block=128x128``."""
        return f"{self.scheme} scale={dtype_name(self.scales)} block={'x'.join(map(str, self.sizes))}"

    def statistics(self) -> Iterator[tuple[str, Any]]:
        yield "scales", self.scales

    def kept(self) -> dict[str, Any]:
        return {self.name: self.data, f"{self.name}{_SCALES}": self.scales}

    def dequantised(self, start: int, stop: int) -> Any:
        import torch

        rows, columns = int(self.shape[-2]), int(self.shape[-1])
        first, last = start // columns, -(-stop // columns)
        found = []
        for row in range(first, last):
            expert, place = divmod(row, rows)
            values = (
                self.data[place : place + 1] if len(self.shape) == 2 else self.data[expert : expert + 1][0][place:][:1]
            )
            found.append(values.detach().cpu().float().reshape(-1) * self._of_row(expert, place, columns))
        return torch.cat(found)[start - first * columns : stop - first * columns]

    def _of_row(self, expert: int, row: int, columns: int) -> Any:
        """Return the scale of each column of a row."""
        scales = self.scales[:] if not hasattr(self.scales, "detach") else self.scales.detach()
        scales = scales.cpu().float()
        if scales.dim() == len(self.shape):
            scales = scales[expert] if scales.dim() == 3 else scales
            return scales[row // self.sizes[0]].repeat_interleave(self.sizes[1])[:columns]
        return scales.reshape(-1)[expert if scales.numel() > 1 else 0]


class FineGrainedFp8(Method):
    """FP8Linear and FP8Experts of transformers."""

    name = "fp8"
    summary = "float8_e4m3fn with one scale a block, stored by the checkpoint or quantised while loading."
    schemes = (
        Scheme(
            FP8,
            "Fine-grained FP8: float8_e4m3fn, one scale for 128 x 128 values; needs a GPU.",
            8,
            packages=("kernels",),
        ),
    )
    imports = ("transformers.integrations.finegrained_fp8",)
    file_methods = ("fp8",)
    runs_on = "GPU (compute capability 8.9, package `kernels`); elsewhere transformers loads it dense"
    held_as = "float8 weight and `weight_scale_inv`"
    proved = "values and scales are the file's; a block dequantised against a dense checkpoint"

    def config(self, job: Job, scheme: str, skips: tuple[str, ...]) -> Any:
        from transformers import FineGrainedFP8Config

        if job.device.kind == "cpu":
            raise NotImplementedError("transformers quantises to FP8 on a GPU only")
        return FineGrainedFP8Config(modules_to_not_convert=list(skips) or None)

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        """Return the weight's own bytes: transformers' module has weight and scales in their types already."""
        return {"": weight.numel() * weight.element_size()} if replaced else None

    def read(self, module: Any) -> Iterable[Stored]:
        for name, param in module._parameters.items():
            scales = module._parameters.get(f"{name}{_SCALES}")
            if param is not None and scales is not None and "float8" in str(param.dtype):
                yield _stored(name, param, scales, getattr(module, "block_size", None))

    def in_file(self, tensors: Mapping[str, Any], name: str, config: Mapping[str, Any]) -> Stored | None:
        values, scales = tensors.get(name), tensors.get(f"{name}{_SCALES}")
        if values is None or scales is None or not values.get_dtype().startswith("F8"):
            return None
        return _stored(name, values, scales, config.get("weight_block_size"))


def _stored(name: str, values: Any, scales: Any, block: Any) -> Stored:
    shape = shape_of(values)
    rows, columns = block or shape[-2:]
    return StoredFp8(
        FP8, shape, values, (name, f"{name}{_SCALES}"), name, scales=scales, sizes=(int(rows), int(columns))
    )
