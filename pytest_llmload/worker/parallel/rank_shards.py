"""What one rank's process holds of a model whose other parts are in other processes."""

from __future__ import annotations

from typing import Any

from pytest_llmload.core.job import Job
from pytest_llmload.worker.model.shards import Piece, Shards
from pytest_llmload.worker.parallel import world
from pytest_llmload.worker.parallel.shard_plan import ShardPlan


def rank_shards(job: Job, model: Any) -> Shards:
    """Return the shards of a model, by the plan that it was split by.

    The model's tensors know the whole that they are part of (DTensors).
    """
    plan = ShardPlan(getattr(model, "_tp_plan", None) or {})
    rank = world.rank()
    pieces = {
        name: Piece(name, rank, tuple(tensor.shape), planned=plan.shards(name))
        for name, tensor in model.state_dict().items()
    }
    return Shards(job.spec.world_size, (rank,), pieces)


def whole_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model before it is split."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def split_shards(job: Job, model: Any, wholes: dict[str, tuple[int, ...]], whole_bytes: int) -> Shards:
    """Return the shards of a model that a library has split in place by rules of its own."""
    rank = world.rank()
    pieces = {name: Piece(name, rank, wholes[name]) for name in model.state_dict() if name in wholes}
    return Shards(job.spec.world_size, (rank,), pieces, whole_bytes)
