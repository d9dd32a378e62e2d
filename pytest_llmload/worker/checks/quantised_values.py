"""Quantised weights hold the checkpoint's values, in the checkpoint's shapes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, plural
from pytest_llmload.quantisation import FileFormat, Stored
from pytest_llmload.quantisation.registry import methods
from pytest_llmload.worker.adapters.rewritten import rewritten
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.checks.problem_names import named, size_of
from pytest_llmload.worker.checks.values import BETWEEN, spot
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import CONV1D, Weight

CHECK = "quantised"

#: Packed values that are compared with a checkpoint that is quantised already.
_PACKED_BLOCK = 4096
#: The mean square of the error, relative to that of the quantiser's own result for the same values. Rounding to 16 bit
#: first moves elements near a tie to the other neighbour, which adds little.
_SPREAD = 1.3
#: The scale of the values, relative to that of the quantiser's own result.
_SLOPE = 0.03
#: Elements that are judged at once: of more, torch shares an operation among threads, which it first starts.
_AT_ONCE = 1 << 15
#: The rounding of a value, its scale and their quotient to 16 bit, relative to the value.
_ROUNDING = 2**-8


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
            f"{counted(len(wrong), 'quantised weight does', 'quantised weights do')} not have the shape that the "
            f"config gives {plural(len(wrong), 'it', 'them')}: {text}",
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
    files, in_file = FileTensors(names), read_format(loaded.job.checkpoint.path)
    found: dict[str, list[tuple[Weight, _Errors]]] = defaultdict(list)
    unread = unnamed = 0
    for weight in weights:
        state = weight.quantised
        # A merged weight is judged with the adapter that is merged into it.
        if weight.name in loaded.merged or state is None or weight.held.device in ("meta", "disk"):
            continue
        try:
            errors = _errors(weight, state, names, in_file, files)
        except NotImplementedError:
            unread += 1
            continue
        if errors is None:
            unnamed += 1
            continue
        kind = _kind(errors)
        if kind and (made := _by_adapter(loaded, weight, state)) is not None:
            errors = _against(weight, state, made)
            kind = _kind(errors)
        if kind:
            found[kind].append((weight, errors))
    if unread:
        what = f"values of {counted(unread, 'quantised weight')}"
        loaded.notes.append(f"{what} were not read: their order belongs to a kernel")
    if unnamed:
        loaded.notes.append(
            f"values of {counted(unnamed, 'quantised weight')} were not compared: the checkpoint has no counterpart, "
            "or their error has no bound"
        )
    for kind, judged in found.items():
        wrong = [weight for weight, _ in judged]
        scheme = wrong[0].quantised.scheme if wrong[0].quantised is not None else ""
        if kind == "largest":
            worst = max(errors.largest for _, errors in judged)
            off = f"off by {worst:.1f} times the error of {scheme}" if math.isfinite(worst) else "not near it"
            of = f"{len(wrong)} of {counted(len(weights), 'weight')}"
            text = f"a dequantised block of {of} is not the checkpoint's: {off}"
        else:
            spread = max(errors.spread for _, errors in judged) ** 0.5
            slope = max((errors.slope for _, errors in judged), key=lambda slope: abs(slope - 1))
            text = (
                f"{len(wrong)} of {counted(len(weights), 'weight')} {plural(len(wrong), 'is', 'are')} not what "
                f"{scheme} makes of the checkpoint's values, although each is within its error: quantised twice, "
                f"scaled or clipped (up to {spread:.1f} times its mean error, and {slope:.2f} times the size)"
            )
        yield Problem(CHECK, text, named(wrong), size_of(wrong))


@dataclass(frozen=True)
class _Errors:
    """How far the sampled blocks of a weight are from the checkpoint's."""

    #: The largest difference, relative to what the type allows.
    largest: float
    #: As :data:`_SPREAD` and :data:`_SLOPE` have it; 1 where they are not known.
    spread: float = 1.0
    slope: float = 1.0


def _kind(errors: _Errors) -> str:
    """Return which bound some errors exceed; empty if they exceed none."""
    if errors.largest > 1:
        return "largest"
    return "mean" if errors.spread > _SPREAD or abs(errors.slope - 1) > _SLOPE else ""


def _by_adapter(loaded: Loaded, weight: Weight, state: Stored) -> Any:
    """Return the values that the adapter's kind makes of the checkpoint's before they are quantised again.

    None if there is no adapter on the weight, or its kind leaves the base as it is.
    """
    name, attached = loaded.checkpoint_names.find(weight.name), loaded.attached
    if weight.held.module.removesuffix(".base_layer") not in loaded.inventory.wrapping.tuned or name is None:
        return None
    original = loaded.checkpoint_names.files.slice(name)[:].float()
    quantised = state.rounded(original.reshape(-1))
    if quantised is None or original.shape != state.shape:
        return None
    module = weight.name.rpartition(".")[0]
    made = rewritten(quantised.reshape(original.shape), module, attached.config, attached.name)
    return None if torch.equal(made, quantised.reshape(original.shape)) else made.reshape(-1)


def _against(weight: Weight, state: Stored, expected: Any) -> _Errors:
    """Return how far some blocks of a weight are from values that were quantised to it, given flat."""
    unit = state.unit
    places = _places(weight.name, state)
    return _judged(state, ((place, expected[place * unit : (place + 1) * unit]) for place in places))


def _places(name: str, state: Stored) -> list[int]:
    """Return the numbers of a weight's first block, its last one, and some between them."""
    units = state.elements // state.unit
    return sorted({0, units - 1, *(spot(name, units, number) for number in range(BETWEEN))})


def _errors(
    weight: Weight, state: Stored, names: CheckpointNames, in_file: FileFormat | None, files: FileTensors
) -> _Errors | None:
    """Return how far some blocks of a weight are from the checkpoint's; None if they cannot be compared.

    Raises NotImplementedError if its values cannot be read.
    """
    if in_file is not None:
        same = as_in_file(weight, state, files.of(weight.module_path), in_file)
        if same is not None:
            return _Errors(0.0 if same else math.inf)
    name = names.find(weight.name)
    if state.max_error is None or (name is None and names.fused(weight.name) is None):
        return None
    if name is not None and not names.files.slice(name).get_dtype().startswith(("F", "BF")):
        return None
    return _judged(state, _originals(weight, state, name, names))


def _judged(state: Stored, originals: Iterable[tuple[int, Any]]) -> _Errors:
    """Return how far a weight is from blocks of values, each with its number."""
    assert state.max_error is not None
    bound = state.max_error + state.scale_error
    largest = actual_error = own_error = product = power = 0.0
    for numbers, original in _together(originals, max(1, _AT_ONCE // state.unit)):
        actual = state.dequantised_blocks(numbers)
        scales = original.abs().amax(dim=1).tolist()
        differences = (actual - original).abs().amax(dim=1).tolist()
        for scale, difference in zip(scales, differences, strict=True):
            largest = max(largest, _ratio(difference, bound * scale))
        rounded = state.rounded(original.reshape(-1))
        if rounded is not None:
            rounded = rounded.reshape(original.shape)
            own_error += float((rounded - original).square().sum() + (original * _ROUNDING).square().sum())
            actual_error += float((actual - original).square().sum())
            # Not ``@``: a library of linear algebra starts all of its threads for the product of two rows.
            product += float((actual.double() * rounded).sum())
            power += float(rounded.double().square().sum())
    if not own_error or not power:
        return _Errors(largest)
    return _Errors(largest, actual_error / own_error, product / power)


def _together(originals: Iterable[tuple[int, Any]], count: int) -> Iterator[tuple[list[int], Any]]:
    """Yield blocks of values, ``count`` at a time: their numbers, and block x element."""
    left = iter(originals)
    while some := list(islice(left, count)):
        yield [number for number, _ in some], torch.stack([values for _, values in some])


def _ratio(difference: float, allowed: float) -> float:
    """Return a difference relative to what is allowed: a scale of 0 allows nothing but 0, NaN is never allowed."""
    if allowed and math.isfinite(difference):
        return difference / allowed
    return 0.0 if difference <= allowed else math.inf


def as_in_file(weight: Weight, state: Stored, tensors: dict[str, Any], in_file: FileFormat) -> bool | None:
    """Return whether a weight is the one that a checkpoint holds quantised; None if the file holds it in no such form.

    What is kept value by value must be the very values; what the library rewrites is compared dequantised.
    """
    if not any(holds_codes(tensors[part]) for part in {*state.kept(), *state.holders} if part in tensors):
        return None
    if not all(_is_in_file(part, tensor, tensors[part]) for part, tensor in state.kept().items() if part in tensors):
        return False
    original = stored_in_file(tensors, weight.name.rpartition(".")[2], in_file)
    if original is None or original.shape != state.shape:
        return original is None
    for number in range(BETWEEN):
        start = spot(weight.name, state.shape[-2], number) * state.shape[-1]
        both = [each.dequantised(start, start + state.shape[-1]) for each in (state, original)]
        if not torch.allclose(*both, rtol=1e-2, atol=float(both[1].abs().max()) * 1e-3):
            return False
    return True


class FileTensors:
    """A checkpoint's tensors by the module that they belong to."""

    def __init__(self, names: CheckpointNames) -> None:
        self._names = names
        self._of: dict[str, dict[str, str]] = defaultdict(dict)
        for name in names.files.where:
            module, _, last = name.rpartition(".")
            self._of[module][last] = name
            # What a quantiser stores beside a weight may be called weight.absmax.
            above, _, middle = module.rpartition(".")
            self._of[above][f"{middle}.{last}"] = name

    def of(self, module: str) -> dict[str, Any]:
        """Return lazy slices of a module's tensors, by their names in it."""
        prefix = self._names.prefix
        bare = module.removeprefix(f"{prefix}.") if prefix else module
        found = next((self._of[path] for path in (module, bare, f"{prefix}.{bare}") if path in self._of), {})
        return {name: self._names.files.slice(full) for name, full in found.items()}


def stored_in_file(tensors: dict[str, Any], name: str, in_file: FileFormat) -> Stored | None:
    """Return a weight as a checkpoint's file holds it; None if the file does not hold it quantised."""
    own = (method for method in methods() if in_file.method in method.file_methods)
    found = (method.in_file(tensors, name, in_file.config) for method in own)
    return next((stored for stored in found if stored is not None), None)


def holds_codes(tensor: Any) -> bool:
    """Return whether a tensor of a file holds codes: integers, or floats of at most 8 bits."""
    return tensor.get_dtype() not in ("F64", "F32", "F16", "BF16")


def _is_in_file(name: str, tensor: Any, original: Any) -> bool:
    """Return whether a tensor's first and last rows, and some between them, are those of a tensor of the checkpoint."""
    flat, shape = tensor.detach().reshape(-1), original.get_shape()
    if not shape:
        return _equal(flat.cpu(), original[...].reshape(-1))
    size = max(1, math.prod(shape[1:]))
    rows = min(max(1, _PACKED_BLOCK // size), shape[0])
    places = {0, shape[0] - rows, *(spot(name, shape[0] - rows + 1, number) for number in range(BETWEEN))}
    return all(
        _equal(flat[first * size : (first + rows) * size].cpu(), original[first : first + rows].reshape(-1))
        for first in sorted(places)
    )


def _equal(values: Any, original: Any) -> bool:
    """Return whether values are the same; those of one byte are the same if their bytes are."""
    if original.dtype.itemsize == 1 and values.dtype.itemsize == 1:
        return bool(torch.equal(values.view(torch.uint8), original.view(torch.uint8)))
    return bool(torch.equal(values, original))


def _originals(weight: Weight, state: Stored, name: str | None, names: CheckpointNames) -> Iterator[tuple[int, Any]]:
    """Yield blocks of the checkpoint's values, fp32, with the number of each.

    The first one, the last one, and some at places that depend on the name alone; of fused experts one of each part of
    each.
    """
    unit = state.unit
    if name is not None:
        places = _places(name, state)
        stretches = [(place * unit, (place + 1) * unit) for place in places]
        # A Conv1D's matrix is transposed before it is quantised (transformers/integrations/bitsandbytes.py).
        for place, values in zip(places, names.files.blocks(name, stretches, weight.kind == CONV1D), strict=True):
            yield place, values.float()
        return
    fused = names.fused(weight.name)
    for expert in range(state.shape[0]) if fused is not None else ():
        begin = expert * math.prod(state.shape[1:])
        for part in fused.parts if fused is not None else ():
            size = math.prod(names.files.slice(part[expert]).get_shape())
            # Whole blocks of the weight that lie within the part.
            first, last = -(-begin // unit), (begin + size) // unit
            if last > first:
                place = first + spot(part[expert], last - first)
                start = place * unit - begin
                yield place, names.files.block(part[expert], start, start + unit).float()
            begin += size
