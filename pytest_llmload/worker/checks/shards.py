"""Each shard holds its own part of the checkpoint, and no more than that."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, format_bytes, plural
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checks.problem_names import named, size_of, sized
from pytest_llmload.worker.checks.values import equal
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.shards import Piece, Shards
from pytest_llmload.worker.model.tensors import Held
from pytest_llmload.worker.parallel.shard_plan import divided_axis, rows

CHECK = "shards"


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare shards by elements and by values; only for loads that are split over ranks.

    Every tensor that the plan shards is 1/N of the whole one, every rank is there, and some rows of each tensor are
    those of the file that its rank should have.
    """
    shards = loaded.shards
    if shards is None or shards.world_size == 1:
        return
    held: dict[int, list[tuple[Held, Piece]]] = defaultdict(list)
    for item in loaded.inventory.held:
        piece = shards.pieces.get(item.path)
        if piece is not None and item.tensor is not None:
            held[piece.rank].append((item, piece))
    missing = [rank for rank in shards.ranks if rank not in held]
    if missing:
        names = tuple(f"rank {rank}" for rank in missing)
        yield Problem(CHECK, f"{len(held)} of {len(shards.ranks)} shards {plural(len(held), 'is', 'are')} there", names)
    for rank, tensors in sorted(held.items()):
        yield from _sizes(shards, rank, tensors)
        yield from _values(loaded, shards, rank, tensors, loaded.checkpoint_names)
        loaded.notes.append(_share(shards, tensors))


def _sizes(shards: Shards, rank: int, tensors: list[tuple[Held, Piece]]) -> Iterator[Problem]:
    wanted = f"{1 / shards.world_size:.1%} of each"
    whole = [held for held, piece in tensors if held.shape == piece.whole and piece.planned]
    total = sum(1 for held, piece in tensors if piece.planned is not False and len(held.shape) > 1)
    divided = [held for held, piece in tensors if held.shape != piece.whole]
    if not divided:
        size = sum(held.nbytes for held, _ in tensors)
        message = (
            f"rank {rank} holds the whole model ({format_bytes(size)}): none of {counted(total, 'weight')} is sharded"
        )
        yield Problem(CHECK, message, named(held for held, _ in tensors), size, rank=rank)
        return
    if whole:
        yield Problem(
            CHECK,
            f"rank {rank} holds {sized(whole, 'weight')} whole, of which the plan gives it {wanted}",
            named(whole),
            size_of(whole),
            rank=rank,
        )
    wrong = [held for held, piece in tensors if not _fits(held, piece, shards.world_size)]
    if wrong:
        first = next((held.shape, piece.whole) for held, piece in tensors if held is wrong[0])
        yield Problem(
            CHECK,
            f"rank {rank} holds parts of the wrong size of {counted(len(wrong), 'weight')} ({list(first[0])} of "
            f"{list(first[1])}{' …' if len(wrong) > 1 else ''}), not {wanted}",
            named(wrong),
            size_of(wrong),
            rank=rank,
        )


def _fits(held: Held, piece: Piece, world_size: int) -> bool:
    try:
        axis = divided_axis(held.shape, piece.whole)
    except ValueError:
        return False
    return axis is None or any(True for _ in rows(piece.whole[axis], held.shape[axis], world_size, piece.rank))


def _values(
    loaded: Loaded, shards: Shards, rank: int, tensors: list[tuple[Held, Piece]], names: CheckpointNames
) -> Iterator[Problem]:
    wrong: dict[str, list[Held]] = defaultdict(list)
    unknown: list[Held] = []
    compared = set()
    for held, piece in tensors:
        row = _reader(piece, names)
        if row is None:
            unknown.append(held)
            continue
        compared.add(held.storage)
        if not _fits(held, piece, shards.world_size) or _is(held, piece, rank, shards.world_size, row):
            continue
        others = (other for other in range(shards.world_size) if other != rank)
        owner = next((other for other in others if _is(held, piece, other, shards.world_size, row)), None)
        wrong["not the checkpoint's" if owner is None else f"those of rank {owner}"].append(held)
    for what, found in wrong.items():
        yield Problem(
            CHECK,
            f"the values of {len(found)} of rank {rank}'s {counted(len(tensors), 'tensor')} are {what}",
            named(found),
            size_of(found),
            rank=rank,
        )
    # A tied tensor has one name in the file, and was compared under that one.
    unknown = [held for held in unknown if held.storage not in compared]
    if unknown:
        # Of a rank with a process of its own, the merged result says which one it is.
        whose = f" of rank {rank}" if len(shards.ranks) > 1 else ""
        loaded.notes.append(
            f"values of {counted(len(unknown), 'tensor')}{whose} were not compared: the checkpoint has none of the "
            f"same name and shape ({', '.join(held.path for held in unknown[:3])})"
        )


def _reader(piece: Piece, names: CheckpointNames) -> Callable[[int], Any] | None:
    """Return a function that reads one row (one expert) of the whole tensor from the file.

    The result is None where the file's tensor cannot be told.
    """
    name = names.find(piece.name)
    if name is not None:
        file = names.files.slice(name)
        if tuple(file.get_shape()) != piece.whole:
            return None
        return lambda row: file[row : row + 1][0] if piece.whole else file[...]
    fused = names.fused(piece.name)
    if fused is None or any(len(part) != piece.whole[0] for part in fused.parts):
        return None
    return lambda row: torch.cat([names.files.slice(part[row])[:] for part in fused.parts])


def _is(held: Held, piece: Piece, rank: int, world_size: int, row: Callable[[int], Any]) -> bool:
    """Return whether a tensor is what ``rank`` should have of the file's.

    The first, the middle and the last row of it are compared.
    """
    if not held.shape:
        return equal(row(0).reshape(1), held.tensor.detach().reshape(1).cpu())
    axis = divided_axis(held.shape, piece.whole)
    places = sorted({0, held.shape[0] // 2, held.shape[0] - 1})
    if axis is None:
        return all(_same(held, piece, place, row(place), world_size) for place in places)
    if axis == 0:
        return any(
            all(_same(held, piece, place, row(way[place]), world_size) for place in places)
            for way in rows(piece.whole[0], held.shape[0], world_size, rank)
        )
    return any(
        all(
            _same(held, piece, place, row(place).index_select(axis - 1, torch.tensor(way)), world_size)
            for place in places
        )
        for way in rows(piece.whole[axis], held.shape[axis], world_size, rank)
    )


def _same(held: Held, piece: Piece, place: int, original: Any, world_size: int) -> bool:
    value = held.tensor[place].detach().cpu()
    if piece.divided:
        original = original.to(value.dtype) / world_size
    return equal(original.reshape(-1), value.reshape(-1))


def _share(shards: Shards, tensors: list[tuple[Held, Piece]]) -> str:
    """Return one sentence, the same for ranks that hold the same."""
    sharded = [(held, piece) for held, piece in tensors if held.shape != piece.whole]
    part = sum(held.nbytes for held, _ in sharded)
    size = sum(math.prod(piece.whole) * held.tensor.element_size() for held, piece in sharded)
    rest = sum(held.nbytes for held, piece in tensors if held.shape == piece.whole)
    share = f"{part / size:.1%}" if size else "nothing"
    return (
        f"of {shards.world_size} ranks, each holds {share} of the sharded weights ({format_bytes(part)}) and "
        f"{format_bytes(rest)} that all ranks hold"
    )
