"""The dense tensors hold what the checkpoint holds.

This needs no baseline and no account by the library: a norm that was initialised instead of loaded, or a layer that got
another's values, shows against the file itself.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, format_bytes, plural
from pytest_llmload.worker.adapters.rewritten import is_rewritten
from pytest_llmload.worker.checkpoints.files import CheckpointFiles, blocks
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checks.tied import pairs, says_untied
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import Held

CHECK = "values"
#: Elements of a block; a smaller tensor is compared whole.
BLOCK = 256
#: Blocks of a tensor that are compared between the first and the last one.
BETWEEN = 8
#: Elements of a tensor that a class may write constants into.
_SMALL = 1 << 16


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare some blocks of every dense tensor, exactly, after the cast to its dtype; see :func:`difference_from`.

    A tensor with several names is held against the file's under each of them, unless the config ties these. Of fused
    experts every one is compared. Tensors whose counterpart in the checkpoint cannot be told are counted in a note;
    whether they are in it at all is for ``keys`` to say.
    """
    names = loaded.checkpoint_names
    tied = set() if says_untied(loaded) else {name for pair in pairs(loaded) for name in pair}
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    compared = 0
    unknown: list[Held] = []
    written: list[str] = []
    for aliases in _dense(loaded):
        paths = {path: held for held in aliases for path in loaded.inventory.base_paths(held)}
        told = ((path, _against_file(held, path, names)) for path, held in paths.items())
        known = [(path, difference) for path, difference in told if difference is not None]
        if not known:
            unknown.append(aliases[0])
            continue
        compared += 1
        if tied.intersection(paths):
            known = known[:1]
        path, difference = next((each for each in known if each[1]), known[0])
        if difference and _by_adapter(loaded, paths[path], path) is not False:
            continue
        if difference and _written_by_class(loaded, paths[path], path):
            written.append(path)
        elif difference:
            held = paths[path]
            # Where an adapter stands, the path is longer than the name in the file; elsewhere they are one.
            shown = held.path if loaded.inventory.base_path(held) == path else path
            found[difference].append((shown, held.nbytes))
    for difference, tensors in found.items():
        yield Problem(
            CHECK,
            f"{len(tensors)} of {counted(compared, 'dense tensor')} {plural(len(tensors), 'does', 'do')} not hold the "
            f"checkpoint's values: {difference}",
            tuple(f"{path} ({format_bytes(nbytes)})" for path, nbytes in tensors),
            sum(nbytes for _, nbytes in tensors),
        )
    if written:
        what = counted(len(written), "tensor")
        loaded.notes.append(f"the class writes constants into {what} after every load ({', '.join(written[:3])})")
    if unknown:
        why = names.files.unread or "the checkpoint has no tensor of their name and shape"
        loaded.notes.append(
            f"values of {counted(len(unknown), 'dense tensor')} were not compared: {why} "
            f"({', '.join(held.path for held in unknown[:3])}{' …' if len(unknown) > 3 else ''})"
        )


def _dense(loaded: Loaded) -> Iterator[list[Held]]:
    """Yield dense tensors of the model's own state dict that are in memory, each with all its names.

    Those that an adapter is merged into, or has trained, are judged with the adapter.
    """
    inventory = loaded.inventory
    names: dict[Any, list[Held]] = defaultdict(list)
    replaced = loaded.replaced
    for held in inventory.held:
        if not held.in_state_dict or held.tensor is None or held.device == "meta" or not held.nbytes:
            continue
        if inventory.is_adapter(held) or inventory.base_path(held) in replaced:
            continue
        if loaded.shards is not None and held.path in loaded.shards.pieces:
            # Part of a whole: compared by the check of shards, which knows which part.
            continue
        if inventory.stored(held) is not None:
            continue
        names[held.device, held.tensor.data_ptr(), held.shape].append(held)
    yield from names.values()


def _written_by_class(loaded: Loaded, held: Held, path: str) -> bool:
    """Return whether the values are the file's after the constants that the class's ``_init_weights`` writes.

    The library calls it after every load, with functions that leave loaded tensors alone; an assignment does not.
    transformers 4 calls it for modules that were not loaded only.
    """
    if find_spec("transformers.initialization") is None:
        return False
    name = loaded.checkpoint_names.find(path)
    initialise = getattr(loaded.model, "_init_weights", None)
    if initialise is None or name is None or held.tensor.numel() > _SMALL:
        return False
    module = copy.deepcopy(loaded.inventory.modules[held.module])
    for tensor in (*module.parameters(), *module.buffers()):
        tensor._is_hf_initialized = True
    values = getattr(module, held.name)
    with torch.no_grad():
        values.copy_(loaded.checkpoint_names.files.block(name, 0, values.numel()).reshape(values.shape))
        initialise(module)
    return bool(torch.equal(getattr(module, held.name), held.tensor))


def _by_adapter(loaded: Loaded, held: Held, path: str) -> bool | None:
    """Return whether a weight is what its adapter's kind makes of the checkpoint's; None where it is random."""
    layer = loaded.inventory.wrapping.tuned.get(held.module.removesuffix(".base_layer"))
    name = loaded.checkpoint_names.find(path)
    if layer is None or held.name != "weight" or name is None:
        return False
    original = loaded.checkpoint_names.files.slice(name)[:]
    module, attached = path.removesuffix(".weight"), loaded.attached
    found = is_rewritten(held.tensor.detach(), original, layer, module, attached.config, attached.name)
    if found is None:
        loaded.notes.append(
            f"{path} was not compared: this kind of adapter changes it at random each time that it is attached"
        )
    return found


def _against_file(held: Held, path: str, names: CheckpointNames) -> str | None:
    """Return how a tensor differs from the file's: empty where it does not, None where the file's cannot be told.

    ``path`` is its name in the model without an adapter.
    """
    name = names.find(path)
    if name is not None:
        part = names.files.slice(name)
        if tuple(part.get_shape()) != held.shape:
            return None
        # Codes of a quantised checkpoint that a library made dense: what they stand for is not in the file as such.
        if part.get_dtype().startswith("F8") and names.files.are_quantised:
            return None
        return difference_from(held.tensor, names.files, name)
    fused = names.fused(path)
    if fused is None or any(len(part) != held.shape[0] for part in fused.parts):
        return None
    row = 0
    for part in fused.parts:
        shapes = {tuple(names.files.slice(name).get_shape()) for name in part}
        if len(shapes) != 1:
            return None
        rows = next(iter(shapes))[0]
        difference = _experts(held.tensor[:, row : row + rows], names.files, part)
        if difference:
            return difference
        row += rows
    return ""


def _experts(tensor: Any, files: CheckpointFiles, part: tuple[str, ...]) -> str:
    """Compare as :func:`difference_from`, by one block of every expert, which come to the CPU in one copy."""
    size = tensor[0].numel()
    stretches = [stretch(name, size) for name in part]
    experts = tensor.detach()
    values = torch.stack([next(blocks(experts[number], [place])) for number, place in enumerate(stretches)]).cpu()
    every = zip(part, stretches, values, strict=True)
    told = (_difference(files.block(name, *place), value) for name, place, value in every)
    return next(filter(None, told), "")


def difference_from(tensor: Any, files: CheckpointFiles, name: str) -> str:
    """Return how a tensor differs from the file's of the same shape; empty where it does not.

    Compared are its first block, its last one, and some between them at places that depend on the name alone: a
    different tensor has different places, every run has the same.
    """
    compared = places(name, tensor.numel())
    values = torch.stack([*blocks(tensor.detach(), compared)]).cpu()
    originals = torch.stack([*files.blocks(name, compared)])
    if equal(originals, values):
        return ""
    return next(filter(None, map(_difference, originals, values)), "")


def _difference(original: Any, value: Any) -> str:
    if equal(original, value):
        return ""
    if not bool(value.isfinite().all()) and bool(original.isfinite().all()):
        return "they hold NaN or infinity, the checkpoint does not"
    if value.numel() > 1 and bool((value == value[0]).all()) and not bool((original == original[0]).all()):
        return f"they are constant {float(value[0]):g}, as initialised and never loaded"
    return "they differ"


def places(name: str, size: int) -> list[tuple[int, int]]:
    """Return the blocks of a tensor that are compared, as elements from and to."""
    last = max(0, size - BLOCK)
    starts = sorted({0, last, *(spot(name, last + 1, number) for number in range(BETWEEN))})
    return [(start, min(start + BLOCK, size)) for start in starts]


def stretch(name: str, size: int) -> tuple[int, int]:
    """Return one block of a tensor."""
    start = spot(name, max(0, size - BLOCK) + 1)
    return start, min(start + BLOCK, size)


def spot(name: str, count: int, number: int = 0) -> int:
    """Return one of ``count`` places, as if at random, but always the same for a name and a number."""
    digest = hashlib.blake2b(f"{name}#{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


def equal(original: Any, value: Any) -> bool:
    """Return whether the values are the file's, cast to the tensor's dtype; to 32 bit also by way of 16 bit.

    The latter is what a load in 16 bit leaves whose norms or head are then kept in 32 bit.
    """
    if not (original.dtype.is_floating_point and value.dtype.is_floating_point):
        return bool(torch.equal(original.to(value.dtype), value))
    ways = [original.to(value.dtype)]
    if value.dtype == torch.float32:
        ways += [original.to(dtype).to(value.dtype) for dtype in (torch.bfloat16, torch.float16)]
    return any(bool(torch.equal(way, value)) for way in ways)
