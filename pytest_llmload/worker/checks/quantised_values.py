"""Quantised weights hold the checkpoint's values, in the checkpoint's shapes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.quantisation import Stored
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checks.problem_names import named, size_of
from pytest_llmload.worker.checks.values import BETWEEN, spot
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import CONV1D, Weight

CHECK = "quantised"

#: Packed values that are compared with a checkpoint that is quantised already.
_PACKED_BLOCK = 4096
#: Mean square of the distance from what the quantiser makes of the checkpoint's values, relative to the mean square of
#: its own error. A load that casts the weight to 16 bit first moves single elements to a neighbouring code.
_FROM_ROUNDED = 0.36


def wrong_shapes(weights: list[Weight]) -> Iterator[Problem]:
    """Yield the weights whose shape is not the one that their module was made for: the config's, not the file's."""
    found: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        expected = tuple(getattr(weight.module, name, None) for name in ("out_features", "in_features"))
        state = weight.quantised
        if state is None or None in expected or len(state.shape) != 2 or state.shape == expected:
            continue
        if weight.kind == CONV1D and state.shape == expected[::-1]:
            continue
        found[f"{_by(state.shape)} in the model, {_by(expected)} by its config"].append(weight)
    for text, wrong in found.items():
        yield Problem(
            CHECK,
            f"{len(wrong)} quantised weights do not have the shape that the config gives them: {text}",
            named(wrong),
            size_of(wrong),
        )


def _by(shape: tuple[Any, ...]) -> str:
    return " x ".join(map(str, shape))


def wrong_values(loaded: Loaded, weights: list[Weight]) -> Iterator[Problem]:
    """Yield the weights of which some dequantised blocks are not the checkpoint's, within the error of the type.

    Where the checkpoint holds them quantised, values and scales must be the very ones.
    """
    names = loaded.checkpoint_names
    wrong: list[Weight] = []
    moved: list[Weight] = []
    worst = furthest = 0.0
    unnamed = 0
    scheme = ""
    for weight in weights:
        state = weight.quantised
        # A merged weight is judged with the adapter that is merged into it.
        if weight.name in loaded.merged or state is None or weight.held.device in ("meta", "disk"):
            continue
        if state.max_error is None:
            continue
        scheme = state.scheme
        error, distance = _errors(weight, state, names)
        if error is None:
            unnamed += 1
        elif error > 1:
            wrong.append(weight)
            worst = max(worst, error)
        elif distance > _FROM_ROUNDED:
            moved.append(weight)
            furthest = max(furthest, distance)
    if unnamed:
        loaded.notes.append(f"values of {unnamed} quantised weights were not compared: the checkpoint has other names")
    if wrong:
        off = f"off by {worst:.1f} times the error of {scheme}" if math.isfinite(worst) else "not near it"
        yield Problem(
            CHECK,
            f"a dequantised block of {len(wrong)} of {len(weights)} weights is not the checkpoint's: {off}",
            named(wrong),
            size_of(wrong),
        )
    if moved:
        yield Problem(
            CHECK,
            f"{len(moved)} of {len(weights)} weights are not what {scheme} makes of the checkpoint's values, although "
            f"each is within its error: quantised twice, scaled or clipped ({furthest**0.5:.1f} times its mean error)",
            named(moved),
            size_of(moved),
        )


def _errors(weight: Weight, state: Stored, names: CheckpointNames) -> tuple[float | None, float]:
    """Return the largest difference over some blocks, relative to what the type allows, and the mean square of the
    distance from the quantiser's own result, relative to the mean square of its error.

    None if the checkpoint's tensor is unknown. Against a checkpoint that holds the packed values already, they must be
    the same.
    """
    name = names.find(weight.name)
    if name is not None and not names.files.slice(name).get_dtype().startswith(("F", "BF")):
        module = name.removesuffix(weight.name.rpartition(".")[2])
        same = all(_begins_as(tensor, module + part, names) for part, tensor in state.kept().items())
        return (0.0 if same else math.inf), 0.0
    if name is None and names.fused(weight.name) is None:
        return None, 0.0
    worst = distance = error = 0.0
    for start, original in _originals(weight, state, name, names):
        scale = float(original.abs().max())
        allowed = ((state.max_error or 0.0) + state.scale_error) * scale
        actual = state.dequantised(start, start + original.numel())
        difference = float((actual - original).abs().max())
        # A scale of 0 allows nothing but 0; NaN is never allowed.
        fits = difference <= allowed
        worst = max(worst, difference / allowed if allowed and math.isfinite(difference) else 0.0 if fits else math.inf)
        rounded = state.rounded(original)
        if rounded is not None:
            # Values that the type holds exactly have no error but that of a scale in 16 bit.
            error += max(float((rounded - original).square().sum()), original.numel() * (scale * 2**-9) ** 2)
            distance += float((actual - rounded).square().sum())
    return worst, distance / error if error else 0.0


def _begins_as(tensor: Any, name: str, names: CheckpointNames) -> bool:
    """Return whether a tensor's first values are the checkpoint's; a file that lacks the tensor says nothing."""
    if name not in names.files.where:
        return True
    values = tensor.detach().reshape(-1)[:_PACKED_BLOCK].cpu()
    return bool(torch.equal(values, names.files.block(name, 0, values.numel())))


def _originals(weight: Weight, state: Stored, name: str | None, names: CheckpointNames) -> Iterator[tuple[int, Any]]:
    """Yield blocks of the checkpoint's values, fp32, with the element that each starts at.

    The first one, the last one, and some at places that depend on the name alone; of fused experts one of each part of
    each.
    """
    # A weight may have fewer elements than a block.
    unit = min(state.block, state.elements)
    if name is not None:
        units = state.elements // unit
        for place in sorted({0, units - 1, *(spot(name, units, number) for number in range(BETWEEN))}):
            # A Conv1D's matrix is transposed before it is quantised (transformers/integrations/bitsandbytes.py).
            start = place * unit
            yield start, names.files.block(name, start, start + unit, transposed=weight.kind == CONV1D).float()
        return
    fused = names.fused(weight.name)
    for expert in range(state.shape[0]) if fused is not None else ():
        begin = expert * math.prod(state.shape[1:])
        for part in fused.parts if fused is not None else ():
            size = math.prod(names.files.slice(part[expert]).get_shape())
            # Whole blocks of the weight that lie within the part.
            first, last = -(-begin // unit), (begin + size) // unit
            if last > first:
                start = (first + spot(part[expert], last - first)) * unit
                yield start, names.files.block(part[expert], start - begin, start - begin + unit).float()
            begin += size
