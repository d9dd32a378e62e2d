"""An adapter that was merged: its weights are ``W + scaling * B @ A``, and the model says what it said unmerged.

Merging rounds the sum to the dtype of the weights, and a quantised weight is quantised a second time. So "the same
output" has a definition of its own: each weight is the sum within the error of its type; and the logits are as far
from those with the adapter beside the weights as a merge that we make ourselves is, give or take a factor of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.adapter_files import AdapterFiles
from pytest_llmload.worker.applied.quantised import TYPE_ERROR
from pytest_llmload.worker.checkpoint_names import CheckpointNames
from pytest_llmload.worker.generation import first_forward
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.quantisable import CONV1D, Weight, quantisable
from pytest_llmload.worker.quantstate import Stored, dequantised

CHECK = "merged"

#: How much further than our own merge's the logits may be from those with the adapter beside the weights.
_FACTOR = 2.0
#: Relative difference of logits below which sums in another order are to blame.
_FLOOR = 1e-5


def check(loaded: Loaded) -> Iterator[Problem]:
    """Three rows of every merged weight, against the checkpoint's and the adapter's files."""
    files = loaded.adapter
    if files is None or loaded.adapter_error or not loaded.job.spec.adapter_merged:
        return
    targets = _targets(loaded)
    missing = sorted(loaded.merged - set(targets))
    if missing:
        yield Problem(CHECK, f"{len(missing)} weights that the adapter changes are not in the model", tuple(missing))
    if not files.is_plain_lora:
        loaded.notes.append("merged weights were not compared: the adapter is no plain LoRA")
        return
    names = loaded.checkpoint_names()
    wrong: list[Weight] = []
    worst, unknown = 0.0, 0
    for path, weight in targets.items():
        name = names.find(path)
        if name is None or not names.files.slice(name).get_dtype().startswith(("F", "BF")):
            unknown += 1
            continue
        error = _error(weight, _Sum(files, names, path, name, weight))
        if error > 1:
            wrong.append(weight)
            worst = max(worst, error)
    if unknown:
        loaded.notes.append(f"{unknown} merged weights were not compared: the checkpoint holds them in another form")
    if wrong:
        yield Problem(
            CHECK,
            f"{len(wrong)} of {len(targets)} weights are not the checkpoint's with the adapter merged in: off by "
            f"{worst:.1f} times what their type allows",
            tuple(weight.name for weight in wrong),
            sum(weight.held.nbytes for weight in wrong),
        )


def output(loaded: Loaded) -> Iterator[Problem]:
    """The logits against those of the same model with the adapter beside its weights, and of our own merge of it.

    No second model is in memory: each merged layer's output is replaced by what the checkpoint's weight and the adapter
    give, one layer at a time.
    """
    files = loaded.adapter
    if files is None or loaded.adapter_error or not loaded.job.spec.adapter_merged or not files.is_plain_lora:
        return
    logits = first_forward(loaded).detach().float().cpu()
    with _instead(loaded, files, merged=False):
        beside = first_forward(loaded).detach().float().cpu()
    with _instead(loaded, files, merged=True):
        own = first_forward(loaded).detach().float().cpu()
    loaded.forget_inventory()
    size = float(beside.norm())
    moved, clean = float((logits - beside).norm()) / size, float((own - beside).norm()) / size
    kinds = "/".join(sorted({_kind(weight) for weight in _targets(loaded).values()}))
    text = f"merging moved the logits by {moved:.2g} (relative); rounding the sums to {kinds} explains {clean:.2g}"
    if moved <= max(_FACTOR * clean, _FLOOR):
        loaded.notes.append(text)
    else:
        yield Problem(CHECK, text)


def _targets(loaded: Loaded) -> dict[str, Weight]:
    """The model's weights that the adapter was merged into, by name."""
    found = {weight.name: weight for weight in quantisable(loaded.model, loaded.inventory)}
    return {name: found[name] for name in sorted(loaded.merged) if name in found}


def _kind(weight: Weight) -> str:
    return weight.quantised.scheme if weight.quantised is not None else weight.held.dtype


class _Sum:
    """What a merged weight should hold, row by row of the checkpoint's tensor, in float32."""

    def __init__(self, files: AdapterFiles, names: CheckpointNames, path: str, name: str, weight: Weight) -> None:
        self._original = names.files.slice(name)
        self.shape = self._original.get_shape()
        module = path.removesuffix(".weight")
        a, b = (factor.float() for factor in files.factors(module))
        scaling = files.scaling(module, a.shape[0])
        # A Conv1D keeps its matrix as inputs x outputs.
        self.conv1d = weight.kind == CONV1D
        self._left, self._right = (a.T * scaling, b.T) if self.conv1d else (b * scaling, a)

    def rows(self, first: int, last: int) -> tuple[Any, Any, Any]:
        """The checkpoint's rows, what the adapter adds, and a bound of the summands' size."""
        original = self._original[first:last].float()
        left = self._left[first:last]
        return original, left @ self._right, original.abs() + left.abs() @ self._right.abs()


def _error(weight: Weight, total: _Sum) -> float:
    """Largest difference over three rows, relative to what the weight's type allows."""
    state = weight.quantised
    worst = 0.0
    for row in sorted({0, total.shape[0] // 2, total.shape[0] - 1}):
        original, delta, size = (part[0] for part in total.rows(row, row + 1))
        if state is None:
            actual = weight.held.tensor.detach()[row].cpu().float()
            # Rounded once as a sum, and once or twice as a product where the adapter itself is in 16 bit.
            allowed = 2 * torch.finfo(weight.held.tensor.dtype).eps * size + 1e-9
        else:
            actual = _stored_row(state, row, total.conv1d)
            # Quantised, merged, and quantised again: the error of the type twice, of the larger scale.
            scale = torch.maximum(original.abs(), (original + delta).abs()).max()
            allowed = 2 * TYPE_ERROR[state.scheme] * scale * (1.1 if state.nested is not None else 1.0)
        ratio = ((actual - original - delta).abs() / allowed).max()
        worst = max(worst, float(ratio) if bool(ratio == ratio) else 1e9)
    return worst


def _stored_row(state: Stored, row: int, conv1d: bool) -> Any:
    """A row of the checkpoint's matrix, dequantised; a Conv1D's is transposed before it is quantised."""
    columns = state.shape[-1]
    if not conv1d:
        return dequantised(state, row * columns, (row + 1) * columns)
    places = range(row, state.elements, columns)
    return torch.cat([dequantised(state, place, place + 1) for place in places])


@contextmanager
def _instead(loaded: Loaded, files: AdapterFiles, *, merged: bool) -> Iterator[None]:
    """Merged layers answer from the files: with the adapter beside their weights, or merged into them by us."""
    names = loaded.checkpoint_names()
    handles = []
    for path, weight in _targets(loaded).items():
        name = names.find(path)
        if name is not None and names.files.slice(name).get_dtype().startswith(("F", "BF")):
            handles.append(weight.module.register_forward_hook(_answer(files, names, path, name, weight, merged)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _answer(files: AdapterFiles, names: CheckpointNames, path: str, name: str, weight: Weight, merged: bool) -> Any:
    module = path.removesuffix(".weight")
    a, b = (factor.float() for factor in files.factors(module))
    b = b * files.scaling(module, a.shape[0])
    kind, conv1d, state = _kind(weight), weight.kind == CONV1D, weight.quantised
    nested, blocksize = (state.nested is not None, state.blocksize) if state is not None else (False, 0)
    linear = torch.nn.functional.linear

    def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        values, dtype = inputs[0], output.dtype
        matrix = names.files.slice(name)[:].to(values.device)
        matrix = _as_stored(matrix.T if conv1d else matrix, kind, nested, blocksize)
        left, right = b.to(values.device), a.to(values.device)
        if merged:
            matrix = _as_stored((matrix.float() + left @ right).to(matrix.dtype), kind, nested, blocksize)
        bias = getattr(layer, "bias", None)
        plain = linear(values.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype))
        return plain if merged else (plain.float() + linear(linear(values.float(), right), left)).to(dtype)

    return hook


def _as_stored(matrix: Any, kind: str, nested: bool, blocksize: int) -> Any:
    """A matrix as a load of the base alone would hold it: rounded to its type, and back."""
    if kind in ("nf4", "fp4"):
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(
            matrix.contiguous(), blocksize=blocksize, compress_statistics=nested, quant_type=kind
        )
        return functional.dequantize_4bit(packed, state)
    if kind == "int8":
        scale = matrix.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        return (matrix.float() / scale).round() * scale
    return matrix.to(getattr(torch, kind))
