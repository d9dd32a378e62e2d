"""Plan the strategies that split every weight over ranks, and say why others cannot be planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_llmload.core.job import Gpu, Job
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.parallel.shard_plan import ShardPlan
from pytest_llmload.worker.planning.overview import Way, planned_job, way_of
from pytest_llmload.worker.planning.planner import ROUNDING, load_dtype

#: CUDA's caching allocator (c10/cuda/CUDACachingAllocator.cpp): requests from ``kMinLargeAlloc`` on get segments of
#: their own, in multiples of ``kRoundLarge``, and what is left of one is split off only above ``kSmallSize``.
_OWN_SEGMENT, _SEGMENT, _SPLIT = 10 << 20, 2 << 20, 1 << 20
#: Which axis of a weight a style of a plan divides; of a bias, its only one.
_AXES = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output", "local_colwise", "packed_colwise"), -2),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input", "local_rowwise", "packed_rowwise"), -1),
    **dict.fromkeys(("local_packed_rowwise", "embedding_colwise"), -1),
    "embedding_rowwise": -2,
}
_UNPLANNED = {
    "deepspeed": "DeepSpeed decides while it loads what it splits and what every rank has whole, by rules of its own",
    "served": "a server decides how much memory it keeps for its cache; its weights alone are those of 'none'",
}


def parallel_ways(
    model: str, directory: Path, gpus: tuple[Gpu, ...], workload: Workload, *, trust_remote_code: bool = False
) -> tuple[Way, ...]:
    """Return what each rank takes under ``tensor_parallel`` and ``tp_plan`` over all GPUs, or why that is not known."""
    makers: dict[str, Callable[[Any, int], ShardPlan]] = {"tensor_parallel": _package_plan, "tp_plan": _own_plan}
    found = []
    for strategy, plan_of in makers.items():
        count = max(len(gpus), 2)
        spec = LoadSpec(model=model, name="m", strategy=strategy, world_size=count, gpu_count=count, workload=workload)
        if len(gpus) < 2:
            found.append(Way(spec.slug, problem="it needs two GPUs or more: name them with --gpu"))
            continue
        job = planned_job(spec, directory, gpus, trust_remote_code)
        try:
            found.append(_way(job, plan_of))
        except (ValueError, ImportError) as error:
            found.append(Way(spec.slug, problem=next(iter(str(error).splitlines()), type(error).__name__)))
    return (*found, *(Way(strategy, problem=reason) for strategy, reason in _UNPLANNED.items()))


def _package_plan(model: Any, world_size: int) -> ShardPlan:
    try:
        from pytest_llmload.worker.parallel.package_config import package_config
    except ImportError as error:
        raise ImportError(f"the package tensor_parallel cannot be imported: {error}") from error
    return package_config(model, world_size)[1]


def _own_plan(model: Any, world_size: int) -> ShardPlan:
    styles = getattr(model, "_tp_plan", None)
    if not styles:
        raise ValueError(f"transformers keeps no tensor-parallel plan (tp_plan) for {type(model).__name__}")
    return ShardPlan(styles)


def _way(job: Job, plan_of: Callable[[Any, int], ShardPlan]) -> Way:
    model = meta_model(Path(job.checkpoint.path), trust_remote_code=job.trust_remote_code, dtype=load_dtype(job))
    count = job.spec.world_size
    sizes = rank_sizes(model, plan_of(model, count), count)
    # transformers reserves one segment for all weights that it loads; the package moves each shard by itself.
    rounded = _in_segments if job.spec.strategy == "tensor_parallel" else _in_blocks
    figures: dict[str, float] = {"host.weights": 0, "disk": 0, "weights.logical": sum(sizes) * count}
    for rank in range(count):
        figures |= {f"gpu.{rank}.weights": sum(sizes), f"gpu.{rank}.settled": sum(map(rounded, sizes))}
    total = Counter({name: figures[f"gpu.0.{name}"] * count for name in ("weights", "settled")})
    figures |= {f"gpu.{name}": value for name, value in total.items()}
    return way_of(job, model.config, figures, {})


def rank_sizes(model: Any, plan: ShardPlan, world_size: int) -> list[int]:
    """Return the bytes of each tensor that the fullest rank holds of a model on the meta device."""
    # A rank has every buffer whole.
    sizes = [buffer.nbytes for buffer in model.buffers()]
    for name, tensor in model.named_parameters():
        style = plan.style(name)
        elements = tensor.numel()
        if plan.shards(name) and style in _AXES:
            axis = _AXES[style] if tensor.dim() > 1 else -1
            elements = elements // tensor.shape[axis] * -(-tensor.shape[axis] // world_size)
        sizes.append(elements * tensor.element_size())
    return sizes


def _in_blocks(size: int) -> int:
    return -(-size // ROUNDING) * ROUNDING


def _in_segments(size: int) -> int:
    """Return what the allocator counts for a tensor that gets a segment of its own."""
    segment = -(-size // _SEGMENT) * _SEGMENT
    return segment if size >= _OWN_SEGMENT and segment - size <= _SPLIT else _in_blocks(size)
