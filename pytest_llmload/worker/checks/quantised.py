"""Quantised as asked: every weight of a matrix product, by its stored bytes, its state and its values."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.quantisation.stored import Stored, dequantised, dtype_name, stored
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.checks import prequantised
from pytest_llmload.worker.checks.devices import planned_device
from pytest_llmload.worker.checks.dtype import is_kept, kept_in_fp32
from pytest_llmload.worker.checks.problem_names import named, size_of
from pytest_llmload.worker.checks.values import BETWEEN, spot
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import CONV1D, EXPERTS, LINEAR, Weight, out_of_reach, quantisable

CHECK = "quantised"

#: Bytes of a weight's packed values, per element.
_PACKED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}
#: Half of the widest gap between two values of the type, relative to the block's or row's largest value, with room
#: for the rounding of weight and scale to 16 bit. NF4: -1 and -0.6962; FP4: 1 and 0.6667; int8: 1/127.
TYPE_ERROR = {"nf4": 0.152 + 0.01, "fp4": 0.167 + 0.01, "int8": 0.5 / 127 + 0.003}
#: 8-bit statistics of the scales, relative to the largest scale of their block.
_NESTED_ERROR = 0.05
#: Packed values that are compared with a checkpoint that is quantised already.
_PACKED_BLOCK = 4096
#: Weights that a scale is shared by, and what kernels for the CPU work off at once.
_BLOCK = 64
#: Patterns in a hint; more say that the load is wrong, not the test.
_HINTED = 3


@dataclass(frozen=True)
class Asked:
    """What the weights should be: by the test, or by the checkpoint's own config."""

    scheme: str
    double_quant: bool
    #: torch's name of a dtype; empty where any will do.
    compute: str
    #: Modules that are left dense on purpose.
    skips: tuple[str, ...]
    #: Whether double quant is fine although nobody asked for it.
    may_nest: bool = False


def check(loaded: Loaded) -> Iterator[Problem]:
    """Problems of a load that asked for int8, nf4 or fp4, or for a checkpoint as it is that is quantised already."""
    spec = loaded.job.spec
    in_file = read_format(loaded.job.checkpoint.path) if spec.strategy != "loader" else None
    skips = (*spec.skip_modules, *(in_file.skips if in_file is not None else ()))
    if spec.quant != "none":
        compute = TORCH_NAMES.get(spec.compute_dtype or "", "")
        yield from _as_asked(
            loaded, Asked(spec.quant, spec.double_quant, compute, skips, may_nest=spec.target is not None)
        )
    elif in_file is not None and in_file.scheme:
        compute = TORCH_NAMES.get(in_file.compute, "")
        yield from _as_asked(loaded, Asked(in_file.scheme, in_file.double_quant, compute, skips))
        loaded.notes.append(f"the checkpoint is quantised already: {in_file.description}")
    elif in_file is not None:
        yield from prequantised.check(loaded, in_file)


def kernel_hint(loaded: Loaded, place: str) -> str:
    """What to do about an error that bitsandbytes raised at ``place``; empty where its cause is not known."""
    if loaded.job.device.kind != "cpu" or not place.startswith("bitsandbytes/"):
        return ""
    inventory = loaded.inventory
    states = [(held.path, stored(inventory.modules[held.module], held.name)) for held in inventory.parameters()]
    shapes = {path: state.shape for path, state in states if state is not None}
    odd = [path for path, shape in shapes.items() if any(size % _BLOCK for size in shape)]
    if not odd:
        return ""
    return (
        f"bitsandbytes' kernels for the CPU need dimensions that are multiples of {_BLOCK}, its block; {len(odd)} of "
        f"{len(shapes)} weights have others ({odd[0]} is {' x '.join(map(str, shapes[odd[0]]))}): leave them out with "
        "skip_modules=, or take a GPU"
    )


def _as_asked(loaded: Loaded, what: Asked) -> Iterator[Problem]:
    spec = loaded.job.spec
    asked: list[Weight] = []
    skipped: list[Weight] = []
    allowed: list[Weight] = []
    offloaded: list[Weight] = []
    for weight in quantisable(loaded.model, loaded.inventory):
        if _skipped(weight.module_path, what.skips):
            skipped.append(weight)
        elif weight.quantised is None and _meant_for_offload(loaded, weight):
            offloaded.append(weight)
        elif weight.quantised is None and _matches(weight.name, spec.dense_ok):
            allowed.append(weight)
        else:
            asked.append(weight)
    yield from _dense(loaded, what.scheme, [weight for weight in asked if weight.quantised is None], asked)
    quantised = [weight for weight in asked if weight.quantised is not None]
    yield from _wrong_type(what, quantised)
    yield from _wrong_values(loaded, what.scheme, quantised)
    touched = [weight for weight in skipped if weight.quantised is not None]
    if touched:
        yield Problem(
            CHECK, "skip_modules names modules that were quantised all the same", named(touched), size_of(touched)
        )
    for source, weights in (("dense_ok", allowed), ("skip_modules", skipped), ("the device map", offloaded)):
        if weights:
            loaded.notes.append(f"{len(weights)} weights ({format_bytes(size_of(weights))}) are dense as {source} says")
    unreached = out_of_reach(loaded.inventory)
    if unreached:
        size = format_bytes(sum(held.nbytes for held in unreached))
        loaded.notes.append(
            f"{len(unreached)} weights ({size}) of torch.nn.MultiheadAttention are dense: it hands them to a function, "
            "so that no module of bitsandbytes can take their place"
        )
    if not asked and not allowed:
        where = " where the device map puts it" if offloaded else ""
        yield Problem(CHECK, f"{what.scheme} was asked for, but the model has no weight that could be quantised{where}")


def _skipped(path: str, patterns: Iterable[str]) -> bool:
    """As the libraries match: a module's full path, its end, or one of the modules above it."""
    return any(path == skip or path.endswith(skip) or f".{skip}." in f".{path}." for skip in patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    module = name.rsplit(".", 1)[0]
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _meant_for_offload(loaded: Loaded, weight: Weight) -> bool:
    """On a GPU run, a weight that the load's own plan puts elsewhere; bitsandbytes keeps such weights dense."""
    planned = loaded.planned_map if loaded.job.device.kind == "cuda" else None
    return planned is not None and planned_device(planned, weight.name) in ("cpu", "disk")


def _dense(loaded: Loaded, scheme: str, dense: list[Weight], asked: list[Weight]) -> Iterator[Problem]:
    """One problem a reason, with the share of the quantisable weights that is quantised."""
    if not dense:
        return
    total = sum(weight.elements for weight in asked)
    share = 1 - sum(weight.elements for weight in dense) / total
    nothing = len(dense) == len(asked)
    reasons: dict[str, list[Weight]] = defaultdict(list)
    for weight in dense:
        reasons[_reason(loaded, weight, nothing)].append(weight)
    for reason, weights in reasons.items():
        head = (
            f"nothing was quantised to {scheme}"
            if nothing
            else f"only {_percent(share)} of the quantisable weights are {scheme}"
        )
        count = "1 weight" if len(weights) == 1 else f"{len(weights)} weights"
        what = f"{count} ({format_bytes(size_of(weights))}) dense"
        yield Problem(CHECK, f"{head}: {what}: {reason}", named(weights), size_of(weights), _hint(scheme, weights))


def _hint(scheme: str, weights: list[Weight]) -> str:
    """The marker that allows these weights to be dense: the end of their modules' paths, whatever the layer."""
    ends = {re.sub(r"^.*\.\d+\.", "*.", weight.module_path) for weight in weights}
    patterns = sorted(f"{end}.*" if any(w.kind == EXPERTS for w in weights) else end for end in ends)
    if len(patterns) > _HINTED:
        return ""
    return f"where that is as it should be: quant({scheme!r}, dense_ok={patterns})"


def _percent(share: float) -> str:
    """Never 100 % of what is not all."""
    return f"{min(share * 100, 99.9):.1f} %"


def _reason(loaded: Loaded, weight: Weight, nothing: bool) -> str:
    cls = type(weight.module).__name__
    dtype = weight.held.dtype
    in_file = getattr(loaded.config, "quantization_config", None)
    if weight.kind == EXPERTS:
        return "fused 3-D experts are parameters, not nn.Linear: bitsandbytes did not see them"
    mapped = {str(device) for device in (loaded.planned_map or {}).values()}
    if nothing and len(mapped) > 1 and loaded.job.device.kind == "cpu":
        return "bitsandbytes keeps dense what a device map puts on the CPU or the disk: on a CPU run, everything"
    if weight.held.device in ("disk", "meta") or weight.held.offloaded:
        return f"they are offloaded ({weight.held.device}), where bitsandbytes keeps them dense"
    if weight.held.device == "cpu" and loaded.job.device.kind == "cuda":
        return "they are on the CPU, where the load was told to keep them dense"
    if cls in ("Linear4bit", "Linear8bitLt"):
        return f"the module is a {cls}, but its weight is a plain {dtype} tensor without quantisation state"
    if nothing and in_file is None:
        return "the model has no quantisation at all; the request was ignored"
    if weight.kind == LINEAR and cls != "Linear":
        return f"{cls} is not nn.Linear itself, the only class that bitsandbytes replaces"
    if is_kept(weight.name, kept_in_fp32(loaded, dtype)):
        return "the model class keeps them in 32 bit (_keep_in_fp32_modules)"
    return f"they were left as {CONV1D if weight.kind == CONV1D else cls}"


def _wrong_type(asked: Asked, weights: list[Weight]) -> Iterator[Problem]:
    """Weights whose bytes or state are not of the asked type."""
    found: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        for message in _differences(asked, weight):
            found[message].append(weight)
    for message, wrong in found.items():
        yield Problem(CHECK, f"{message} ({len(wrong)} of {len(weights)} weights)", named(wrong), size_of(wrong))


def _differences(asked: Asked, weight: Weight) -> Iterator[str]:
    state = weight.quantised
    assert state is not None
    if state.scheme != asked.scheme:
        called = f", which its state calls {state.label}" if state.label else ""
        yield f"{asked.scheme} was asked for, {state.scheme} is stored{called}"
        return
    if state.label:
        yield f"{state.scheme} is stored, but its state calls it {state.label}, and is read as that"
    expected = round(state.elements * _PACKED[state.scheme])
    if weight.held.nbytes != expected:
        yield f"{state.elements} elements of {state.scheme} take {weight.held.nbytes} bytes, not {expected}"
    if state.scheme == "int8":
        return
    if asked.double_quant and state.nested is None:
        yield f"double quant was asked for, but the statistics are plain {dtype_name(state.scales)}"
    # A user's own loader may nest them: the marker then says only what must hold.
    if not asked.double_quant and not asked.may_nest and state.nested is not None:
        yield "double quant was not asked for, but the statistics are quantised"
    if asked.compute and state.compute != asked.compute:
        yield f"compute dtype {asked.compute} was asked for, {state.compute or 'none'} is set"


def _wrong_values(loaded: Loaded, scheme: str, weights: list[Weight]) -> Iterator[Problem]:
    """Weights of which a dequantised block is not the checkpoint's within the type's error.

    Where the checkpoint holds them quantised, values and scales must be the very ones.
    """
    names = loaded.checkpoint_names
    wrong: list[Weight] = []
    worst = 0.0
    unnamed = 0
    for weight in weights:
        if weight.name in loaded.merged:
            # Judged with the adapter that is merged into it.
            continue
        state = weight.quantised
        if state is None or state.scheme not in TYPE_ERROR or weight.held.device in ("meta", "disk"):
            continue
        error = _relative_error(weight, state, names)
        if error is None:
            unnamed += 1
        elif error > 1:
            wrong.append(weight)
            worst = max(worst, error)
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


def _relative_error(weight: Weight, state: Stored, names: CheckpointNames) -> float | None:
    """Largest difference over some blocks (or rows of int8), relative to what the type allows.

    None where the checkpoint's tensor cannot be told. Against a checkpoint that holds the packed values already, they
    must be the same.
    """
    name = names.find(weight.name)
    if name is not None and not names.files.slice(name).get_dtype().startswith(("F", "BF")):
        scales = f"{name}.absmax" if state.scheme != "int8" else f"{name.removesuffix('weight')}SCB"
        same = _begins_as(weight.held.tensor, name, names) and _begins_as(state.scales, scales, names)
        return 0.0 if same else math.inf
    worst = 0.0
    for start, original in _originals(weight, state, name, names):
        scale = float(original.abs().max())
        allowed = (TYPE_ERROR[state.scheme] + (_NESTED_ERROR if state.nested is not None else 0.0)) * scale
        difference = float((dequantised(state, start, start + original.numel()) - original).abs().max())
        # A scale of 0 allows nothing but 0; NaN is never allowed.
        fits = difference <= allowed
        worst = max(worst, difference / allowed if allowed and math.isfinite(difference) else 0.0 if fits else math.inf)
    return worst if name is not None or names.fused(weight.name) is not None else None


def _begins_as(tensor: Any, name: str, names: CheckpointNames) -> bool:
    """Whether a tensor's first values are those of the checkpoint's; a file that lacks it says nothing."""
    if name not in names.files.where:
        return True
    values = tensor.detach().reshape(-1)[:_PACKED_BLOCK].cpu()
    return bool(torch.equal(values, names.files.block(name, 0, values.numel())))


def _originals(weight: Weight, state: Stored, name: str | None, names: CheckpointNames) -> Iterator[tuple[int, Any]]:
    """Blocks of the checkpoint's values, fp32, with the element that each starts at.

    The first one, the last one, and some at places that depend on the name alone; of fused experts one of each part of
    each.
    """
    unit = state.shape[-1] if state.scheme == "int8" else state.blocksize
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
