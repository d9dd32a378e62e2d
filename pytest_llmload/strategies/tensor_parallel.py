"""Weights split over several devices of one process, by the tensor_parallel package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.strategies.base import Strategy, why_ignored

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec


class TensorParallel(Strategy):
    """The package itself, with a Config made from transformers' own plan for the architecture.

    The package's own Configs do not know the modules of current transformers. One process drives all shards, each with
    a key-value cache of its own. The package first reads the whole model to the host; the shards are then on cuda:0,
    cuda:1 …, or all on the CPU.
    """

    name = "tensor_parallel"
    summary = "The tensor_parallel package over world_size devices, by transformers' own plan for the architecture."
    fields: ClassVar[dict[str, Any]] = {"strategy": "tensor_parallel", "world_size": 2}
    packages = (*Strategy.packages, "tensor_parallel")
    same_output = True

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        if spec.quant != AS_STORED:
            return (
                "the tensor_parallel package splits dense weights only: it would lose the state of "
                f"{spec.quant} weights; take tensor_parallel or quant, not both"
            )
        return why_ignored(spec, "device_map", "max_memory")

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        return {"device_map": {"": "cpu"}}

    def context(self, job: Job) -> None:
        # Imported here, since imports during the load would count towards its time.
        from pytest_llmload.worker.parallel import sharded_model

        assert sharded_model

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        from pytest_llmload.worker.model.loading import from_pretrained
        from pytest_llmload.worker.parallel.sharded_model import shard

        loaded = from_pretrained(job, kwargs)
        size = job.spec.world_size
        devices = [f"cuda:{rank}" for rank in range(size)] if job.device.kind == "cuda" else ["cpu"] * size
        loaded.model, loaded.shards = shard(loaded.model, devices)
        return loaded
