"""transformers' own tensor parallelism: one process for each rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import RANKS, Job
from pytest_llmload.strategies.base import Strategy, why_ignored

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.worker.model.loaded import Loaded


class TpPlan(Strategy):
    """``from_pretrained`` in ``world_size`` processes, each of which reads its part of the checkpoint only.

    transformers' plan for the architecture says how weights are split. torch elastic starts the processes, which
    communicate over NCCL on GPUs and over gloo on the CPU.
    """

    name = "tp_plan"
    summary = "transformers' own tensor parallel in world_size processes, started through torch elastic."
    fields: ClassVar[dict[str, Any]] = {"strategy": "tp_plan", "world_size": 2}
    runs_in = RANKS
    same_output = True

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        return why_ignored(spec, "device_map", "max_memory")

    def context(self, job: Job) -> None:
        # rank_shards too is imported here, since imports during the load would count towards its time.
        from pytest_llmload.worker.parallel import rank_shards, world

        assert rank_shards
        world.join(job)

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        try:
            from transformers.distributed import DistributedConfig

            return {"distributed_config": DistributedConfig(tp_size=job.spec.world_size)}
        except (ImportError, TypeError):
            # Before transformers 5.x the plan was an argument of its own.
            return {"tp_plan": "auto"}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        from pytest_llmload.worker.model.loading import from_pretrained
        from pytest_llmload.worker.parallel.rank_shards import rank_shards

        loaded = from_pretrained(job, kwargs)
        loaded.shards = rank_shards(job, loaded.model)
        return loaded

    def why_not_run(self, job: Job, loaded: Loaded) -> str:
        """Name heads that do not divide: transformers splits their weights all the same (5.17, 5.23)."""
        from pytest_llmload.worker.parallel.shard_plan import uneven_heads

        return uneven_heads(loaded.model, job.spec.world_size)
