"""The dense tensors hold what the checkpoint holds.

This needs no baseline and no account by the library: a norm that was initialised instead of loaded, or a layer that got
another's values, shows against the file itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.applied.sized import named, size_of
from pytest_llmload.worker.checkpoint_files import CheckpointFiles
from pytest_llmload.worker.checkpoint_names import CheckpointNames
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.quantstate import stored
from pytest_llmload.worker.tensors import BUFFER, PARAMETER, Held, Inventory

CHECK = "values"
#: Elements of a block; a smaller tensor is compared whole.
BLOCK = 256


def check(loaded: Loaded) -> Iterator[Problem]:
    """One block at the start, the middle and the end of every dense tensor, exactly, after the cast to its dtype.

    Of fused experts the first and the last one are compared. Tensors that the checkpoint holds under a name that cannot
    be told are counted in a note.
    """
    names = loaded.checkpoint_names
    found: dict[str, list[Held]] = defaultdict(list)
    compared = 0
    unknown: list[Held] = []
    for aliases in _dense(loaded):
        told = (_against_file(held, loaded.inventory.base_path(held), names) for held in aliases)
        difference = next((difference for difference in told if difference is not None), None)
        if difference is None:
            unknown.append(aliases[0])
            continue
        compared += 1
        if difference:
            found[difference].append(aliases[0])
    for difference, tensors in found.items():
        yield Problem(
            CHECK,
            f"{len(tensors)} of {compared} dense tensors do not hold the checkpoint's values: {difference}",
            named(tensors),
            size_of(tensors),
        )
    if loaded.loading_info is None:
        yield from _missing(unknown, loaded.inventory, names.files)
    if unknown:
        loaded.notes.append(
            f"values of {len(unknown)} dense tensors were not compared: the checkpoint holds them under other names or "
            f"in another shape ({', '.join(held.path for held in unknown[:3])}{' …' if len(unknown) > 3 else ''})"
        )


def _dense(loaded: Loaded) -> Iterator[list[Held]]:
    """Dense tensors of the model's own state dict that are in memory, each with all its names.

    Those that an adapter is merged into are judged with the adapter.
    """
    inventory = loaded.inventory
    names: dict[Any, list[Held]] = defaultdict(list)
    for held in inventory.held:
        dense = held.role == PARAMETER or (held.role == BUFFER and held.persistent)
        if not dense or held.tensor is None or held.device == "meta" or not held.nbytes:
            continue
        if inventory.is_adapter(held) or inventory.base_path(held) in loaded.merged:
            continue
        if loaded.shards is not None and held.path in loaded.shards.pieces:
            # Part of a whole: compared by the check of shards, which knows which part.
            continue
        if held.role == PARAMETER and stored(inventory.modules[held.module], held.name) is not None:
            continue
        names[held.device, held.tensor.data_ptr(), held.shape].append(held)
    yield from names.values()


def _against_file(held: Held, path: str, names: CheckpointNames) -> str | None:
    """How a tensor differs from the file's: empty where it does not, None where the file's cannot be told.

    ``path`` is its name in the model without an adapter.
    """
    name = names.find(path)
    if name is not None:
        if tuple(names.files.slice(name).get_shape()) != held.shape:
            return None
        return difference_from(held.tensor, names.files, name)
    fused = names.fused(path)
    if fused is None or any(len(part) != held.shape[0] for part in fused.parts):
        return None
    for expert in sorted({0, held.shape[0] - 1}):
        row = 0
        for part in fused.parts:
            rows = names.files.slice(part[expert]).get_shape()[0]
            difference = difference_from(held.tensor[expert, row : row + rows], names.files, part[expert])
            if difference:
                return difference
            row += rows
    return ""


def difference_from(tensor: Any, files: CheckpointFiles, name: str) -> str:
    """How a tensor differs from the file's of the same shape, by three blocks; empty where it does not."""
    size = tensor.numel()
    starts = sorted({0, max(0, size // 2 - BLOCK // 2), max(0, size - BLOCK)})
    for start in starts:
        stop = min(start + BLOCK, size)
        original = files.block(name, start, stop)
        value = _block(tensor, start, stop)
        if equal(original, value):
            continue
        if not bool(value.isfinite().all()) and bool(original.isfinite().all()):
            return "they hold NaN or infinity, the checkpoint does not"
        if value.numel() > 1 and bool((value == value[0]).all()) and not bool((original == original[0]).all()):
            return f"they are constant {float(value[0]):g}, as initialised and never loaded"
        return "they differ"
    return ""


def _block(tensor: Any, start: int, stop: int) -> Any:
    """Elements ``start`` to ``stop``, row by row, on the CPU, without copying the tensor where it is not contiguous."""
    tensor = tensor.detach()
    if tensor.dim() == 0:
        return tensor.reshape(1).cpu()
    row = tensor[0].numel()
    first, last = start // row, -(-stop // row)
    return tensor[first:last].reshape(-1)[start - first * row : stop - first * row].cpu()


def equal(original: Any, value: Any) -> bool:
    """Whether the values are the file's, cast to the tensor's dtype, or cast there by way of a 16-bit dtype.

    The latter is what a load in 16 bit leaves whose norms or head are then kept in 32 bit.
    """
    if not (original.dtype.is_floating_point and value.dtype.is_floating_point):
        return bool(torch.equal(original.to(value.dtype), value))
    ways = [original.to(value.dtype)]
    ways += [original.to(dtype).to(value.dtype) for dtype in (torch.bfloat16, torch.float16)]
    return any(bool(torch.equal(way, value)) for way in ways)


def _missing(unknown: list[Held], inventory: Inventory, files: CheckpointFiles) -> Iterator[Problem]:
    """Tensors that the file lacks although it has their like in another layer; for loads that give no account."""
    patterns = {re.sub(r"\d+", "*", name) for name in files.where}
    missing = [held for held in unknown if re.sub(r"\d+", "*", inventory.base_path(held)) in patterns]
    missing = [held for held in missing if files.find(inventory.base_path(held)) is None]
    if missing:
        yield Problem(
            CHECK,
            f"{len(missing)} tensors are not in the checkpoint, which has their like in other layers",
            tuple(held.path for held in missing),
            size_of(missing),
        )
