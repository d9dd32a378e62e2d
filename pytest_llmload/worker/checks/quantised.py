"""Quantised as asked: every weight of a matrix product, by its stored bytes, its state and its values."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import AS_STORED, BY_CONFIG
from pytest_llmload.core.units import counted, format_bytes, plural
from pytest_llmload.quantisation import Method, Request
from pytest_llmload.quantisation.registry import method_of, methods
from pytest_llmload.worker.checkpoints.gguf_files import described, only_file
from pytest_llmload.worker.checkpoints.quantisation_config import read_format
from pytest_llmload.worker.checks import prequantised
from pytest_llmload.worker.checks.devices import planned_device
from pytest_llmload.worker.checks.dtype import is_kept, kept_in_fp32
from pytest_llmload.worker.checks.problem_names import dense_weights, named, size_of, sized
from pytest_llmload.worker.checks.quantised_values import wrong_shapes, wrong_values
from pytest_llmload.worker.checks.tied import pairs
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.quantisable import (
    CONV1D,
    EXPERTS,
    LINEAR,
    Weight,
    dense_by_default,
    out_of_reach,
    output_heads,
    quantisable,
    weights_of,
)
from pytest_llmload.worker.model.tensors import Held

CHECK = "quantised"

#: Patterns in a hint; more say that the load is wrong, not the test.
_HINTED = 3


def check(loaded: Loaded) -> Iterator[Problem]:
    """Yield the problems of a load that asked for a scheme, or for a checkpoint as it is that is quantised already."""
    spec = loaded.job.spec
    loaded.quantised = {
        weight.name: (weight.quantised.scheme, weight.nbytes)
        for weight in quantisable(loaded.model, loaded.inventory)
        if weight.quantised
    }
    in_file = read_format(loaded.job.checkpoint.path) if not loaded.own_code else None
    skips = (*spec.skip_modules, *(in_file.skips if in_file is not None else ()))
    if spec.quant == BY_CONFIG:
        yield from _as_configured(loaded, skips)
    elif spec.quant != AS_STORED:
        compute = TORCH_NAMES.get(spec.compute_dtype or "", "")
        yield from _as_asked(
            loaded, Request(spec.quant, spec.double_quant, compute, skips, may_nest=spec.target is not None)
        )
    elif in_file is not None and in_file.scheme and in_file.method in method_of(in_file.scheme).file_methods:
        compute = TORCH_NAMES.get(in_file.compute, "")
        yield from _as_asked(loaded, Request(in_file.scheme, in_file.double_quant, compute, skips))
        loaded.notes.append(f"the checkpoint is quantised already: {in_file.description}")
    elif in_file is not None:
        yield from prequantised.check(loaded, in_file)
    elif gguf := only_file(Path(loaded.job.checkpoint.path)):
        size = sum(held.nbytes for held in loaded.inventory.parameters())
        loaded.notes.append(
            f"transformers makes GGUF files dense, whatever its log says: {described(gguf)}, {format_bytes(size)} in "
            "memory"
        )
    _note_held_bits(loaded)


def after_forward(loaded: Loaded) -> Iterator[Problem]:
    """Yield the weights that were quantised when the load returned, and are dense, or of a different type, in the state
    that serves.
    """
    if not loaded.quantised:
        return
    now = {weight.name: weight for weight in quantisable(loaded.model, loaded.inventory)}
    for kinds, changed in _of_other_types(loaded, now).items():
        of = counted(len(loaded.quantised), "quantised weight")
        text = f"the first forward made {len(changed)} of {of} {kinds[1]}, which {plural(len(changed), 'was', 'were')}"
        yield Problem(CHECK, f"{text} {kinds[0]} when the load returned", named(changed), size_of(changed))
    dense = [now[name] for name in loaded.quantised if name in now and now[name].quantised is None]
    if not dense:
        return
    before = format_bytes(sum(loaded.quantised[weight.name][1] for weight in dense))
    reasons = {reason for weight in dense for method in methods() if (reason := method.why_dense(weight.module))}
    text = (
        f"the first forward made {len(dense)} of {counted(len(loaded.quantised), 'quantised weight')} dense: "
        f"{before} when the load returned, and {format_bytes(size_of(dense))} while it serves"
    )
    yield Problem(CHECK, ": ".join([text, *sorted(reasons)]), named(dense), size_of(dense))


def _of_other_types(loaded: Loaded, now: dict[str, Weight]) -> dict[tuple[str, str], list[Weight]]:
    """Return the weights whose type the first forward changed, by the type before and after it."""
    found: dict[tuple[str, str], list[Weight]] = defaultdict(list)
    for name, (scheme, _) in loaded.quantised.items():
        state = now[name].quantised if name in now else None
        if state is not None and state.scheme != scheme:
            found[scheme, state.scheme].append(now[name])
    return found


def _as_configured(loaded: Loaded, skips: tuple[str, ...]) -> Iterator[Problem]:
    """Judge a load with a ``quantization_config`` of the user's: something is quantised, in true shapes and values."""
    weights = [w for w in quantisable(loaded.model, loaded.inventory) if not _skipped(w.module_path, skips)]
    quantised = [weight for weight in weights if weight.quantised is not None]
    dense = [weight for weight in weights if weight.quantised is None]
    packed = prequantised.packed_modules(loaded)
    if not packed:
        text = f"{loaded.job.spec.quant_config} was requested, but nothing is quantised: {dense_weights(dense)}"
        yield Problem(CHECK, text, named(dense), size_of(dense))
        return
    yield from wrong_shapes(quantised)
    yield from wrong_values(loaded, quantised)
    kinds = ", ".join(sorted({weight.quantised.scheme for weight in quantised if weight.quantised is not None}))
    what = f"{counted(len(quantised), 'weight')} ({kinds or 'of an unknown method'})"
    loaded.notes.append(f"{loaded.job.spec.quant_config} quantised {what}; {dense_weights(dense)}")
    if packed and not quantised:
        loaded.notes.append(
            f"{counted(packed, 'module holds', 'modules hold')} quantised weights in a form that pytest-llmload does "
            "not know: they are counted and named, but neither their type nor their values were checked"
        )


def _note_held_bits(loaded: Loaded) -> None:
    """Note weights whose values take more bits in memory than their type has."""
    found: dict[tuple[str, float, float], int] = defaultdict(int)
    for weight in quantisable(loaded.model, loaded.inventory):
        state = weight.quantised
        if state is not None and state.packed_bytes * 8 > state.elements * state.bits:
            found[state.scheme, state.bits, state.packed_bytes * 8 / state.elements] += 1
    for (scheme, bits, held), count in found.items():
        what = counted(count, f"weight of {scheme} holds its", f"weights of {scheme} hold their")
        loaded.notes.append(f"{what} {bits:g} bits an element in {held:g} bits of memory")


def library_hint(loaded: Loaded, place: str) -> str:
    """Return what to do about an error that a quantiser's library raised at ``place``; empty if that is unknown."""
    inventory = loaded.inventory
    states = [(held.path, inventory.stored(held)) for held in inventory.parameters()]
    shapes = {path: state.shape for path, state in states if state is not None}
    hints = (method.hint(place, loaded.job.device.kind, shapes) for method in methods())
    return next(filter(None, hints), "")


def _as_asked(loaded: Loaded, what: Request) -> Iterator[Problem]:
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
    yield from wrong_shapes(quantised)
    yield from wrong_values(loaded, quantised)
    touched = [weight for weight in skipped if weight.quantised is not None]
    if touched:
        yield Problem(
            CHECK, "skip_modules names modules that were quantised all the same", named(touched), size_of(touched)
        )
    yield from _not_asked(loaded)
    for source, weights in (("dense_ok", allowed), ("skip_modules", skipped), ("the device map", offloaded)):
        if weights:
            loaded.notes.append(f"{dense_weights(weights)} as {source} says")
    unreached = out_of_reach(loaded.inventory)
    if unreached:
        loaded.notes.append(
            f"{dense_weights(unreached)} since they are of torch.nn.MultiheadAttention, which hands them to a "
            f"function, so that no module of {method_of(what.scheme).name} can take their place"
        )
    if not asked and not allowed:
        where = " where the device map puts it" if offloaded else ""
        yield Problem(CHECK, f"{what.scheme} was requested, but the model has no weight that could be quantised{where}")


def _not_asked(loaded: Loaded) -> Iterator[Problem]:
    """Yield embeddings and output heads that are quantised although they are dense by default.

    A router, or a patch embedding, that is a Linear of its own is one of those that libraries quantise: it is noted.
    """
    expected = {weight.name for weight in quantisable(loaded.model, loaded.inventory)}
    # What a model has beside its base, such as a head's hidden layer, a library may quantise.
    dense = dense_by_default(loaded.model, loaded.inventory)
    found = [held for held, state, tensor in weights_of(loaded.inventory) if state is not None and id(tensor) in dense]
    # A parametrized weight is called original in its own module.
    others = [held for held in found if loaded.inventory.base_path(held) not in expected and held.name != "original"]
    heads = output_heads(loaded.inventory)
    by_class = [held for held in others if _is_linear(loaded, held) and held.module not in heads]
    others = [held for held in others if held not in by_class]
    if by_class:
        what = counted(len(by_class), "weight") + " that most architectures keep dense"
        what += f" {plural(len(by_class), 'is', 'are')} a Linear here, and quantised"
        loaded.notes.append(f"{what}: {', '.join(held.path for held in by_class[:3])}")
    if not others:
        return
    what = counted(
        len(others), "weight that is dense by default is quantised", "weights that are dense by default are quantised"
    )
    what += ": output head or embedding"
    if loaded.own_code:
        loaded.notes.append(f"{what} ({', '.join(held.path for held in others[:3])})")
    else:
        yield Problem(CHECK, what, tuple(held.path for held in others), sum(held.nbytes for held in others))


def _is_linear(loaded: Loaded, held: Held) -> bool:
    return hasattr(loaded.inventory.modules[held.module], "out_features")


def _skipped(path: str, patterns: Iterable[str]) -> bool:
    """Return whether a name matches as in the libraries: a module's full path, its end, or one of the modules above."""
    return any(path == skip or path.endswith(skip) or f".{skip}." in f".{path}." for skip in patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    module = name.rsplit(".", 1)[0]
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module, pattern) for pattern in patterns)


def _meant_for_offload(loaded: Loaded, weight: Weight) -> bool:
    """Return whether, on a GPU run, the load's own plan puts a weight elsewhere.

    bitsandbytes keeps such weights dense.
    """
    planned = loaded.planned_map if loaded.job.device.kind == "cuda" else None
    return planned is not None and planned_device(planned, weight.name) in ("cpu", "disk")


def _dense(loaded: Loaded, scheme: str, dense: list[Weight], asked: list[Weight]) -> Iterator[Problem]:
    """Yield one problem for each reason, with the share of the quantisable weights that is quantised."""
    if not dense:
        return
    total = sum(weight.elements for weight in asked)
    share = 1 - sum(weight.elements for weight in dense) / total
    nothing = len(dense) == len(asked)
    reasons: dict[str, list[Weight]] = defaultdict(list)
    for weight in dense:
        reasons[_reason(loaded, method_of(scheme), weight, nothing)].append(weight)
    for reason, weights in reasons.items():
        head = (
            f"nothing was quantised to {scheme}"
            if nothing
            else f"only {_percent(share)} of the quantisable weights are {scheme}"
        )
        yield Problem(
            CHECK,
            f"{head}: {sized(weights, 'weight')} dense: {reason}",
            named(weights),
            size_of(weights),
            _hint(scheme, weights),
        )


def _hint(scheme: str, weights: list[Weight]) -> str:
    """Return the marker that allows these weights to be dense: the end of their modules' paths, whatever the layer."""
    ends = {re.sub(r"^.*\.\d+\.", "*.", weight.module_path) for weight in weights}
    patterns = sorted(f"{end}.*" if any(w.kind == EXPERTS for w in weights) else end for end in ends)
    if len(patterns) > _HINTED:
        return ""
    return f"if that is intended: quant({scheme!r}, dense_ok={patterns})"


def _percent(share: float) -> str:
    """Return a share as text, never 100 % of what is not all."""
    return f"{min(share * 100, 99.9):.1f} %"


def _reason(loaded: Loaded, method: Method, weight: Weight, nothing: bool) -> str:
    cls = type(weight.module).__name__
    dtype = weight.held.dtype
    in_file = getattr(loaded.config, "quantization_config", None)
    if weight.kind == EXPERTS:
        return f"fused 3-D experts are parameters, not nn.Linear: {method.name} did not see them"
    mapped = {str(device) for device in (loaded.planned_map or {}).values()}
    if nothing and len(mapped) > 1 and loaded.job.device.kind == "cpu":
        return f"{method.name} keeps dense what a device map puts on the CPU or the disk: on a CPU run, everything"
    if weight.held.device in ("disk", "meta") or weight.held.offloaded:
        return f"they are offloaded ({weight.held.device}), where {method.name} keeps them dense"
    if weight.held.device == "cpu" and loaded.job.device.kind == "cuda":
        return "they are on the CPU, where the load was told to keep them dense"
    if why := method.why_dense(weight.module):
        return why
    if nothing and in_file is None:
        return "the model has no quantisation at all; the request was ignored"
    if tied := _tied_to(loaded, weight):
        return f"they are tied to those of {tied}, and transformers leaves tied weights dense"
    if weight.kind == LINEAR and cls != "Linear":
        return f"{cls} is not nn.Linear itself, the only class that {method.name} replaces"
    if is_kept(weight.name, kept_in_fp32(loaded, dtype)):
        return f"the model class keeps them dense (_keep_in_fp32_modules), here in {dtype}"
    return f"they were left as {CONV1D if weight.kind == CONV1D else cls}"


def _tied_to(loaded: Loaded, weight: Weight) -> str:
    """Return the part of the model in which a weight stands too; empty if it has one name."""
    names = [name for name in loaded.inventory.base_paths(weight.held) if name != weight.name]
    for pair in pairs(loaded):
        names += [name for name in pair if weight.name in pair and name != weight.name]
    if not names:
        return ""
    own, other = weight.name.split("."), names[0].split(".")
    while len(own) > 1 and len(other) > 1 and own[-1] == other[-1]:
        own.pop()
        other.pop()
    return ".".join(other)


def _wrong_type(asked: Request, weights: list[Weight]) -> Iterator[Problem]:
    """Report weights whose bytes or state are not of the requested type."""
    found: dict[str, list[Weight]] = defaultdict(list)
    for weight in weights:
        for message in _differences(asked, weight):
            found[message].append(weight)
    for message, wrong in found.items():
        yield Problem(
            CHECK, f"{message} ({len(wrong)} of {counted(len(weights), 'weight')})", named(wrong), size_of(wrong)
        )


def _differences(asked: Request, weight: Weight) -> Iterator[str]:
    state = weight.quantised
    assert state is not None
    if state.scheme != asked.scheme:
        called = f", which its state calls {state.label}" if state.label else ""
        yield f"{asked.scheme} was requested, but {state.scheme} is stored{called}"
        return
    if state.label:
        yield f"{state.scheme} is stored, but its state calls it {state.label}, and is read as that"
    expected = round(state.elements * state.bits / 8)
    if state.packed_bytes != expected:
        yield f"{state.elements} elements of {state.scheme} take {state.packed_bytes} bytes, not {expected}"
    yield from state.differences(asked)
