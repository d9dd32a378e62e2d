"""Bytes of the model's weights, exact: distinct live storages on GPUs and host, before any forward."""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar

from pytest_llmload.core.metrics import Metric, named, of_gpu
from pytest_llmload.core.results import SLACK, LoadResult
from pytest_llmload.core.units import format_bytes
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.model.loaded import Loaded


class Weights(Probe):
    """Measures ``gpu.weights``, ``host.weights``, ``weights.logical``, and each GPU's, shard's and adapter's part."""

    metrics: ClassVar[tuple[Metric, ...]] = named(
        "host.weights", "gpu.weights", "gpu.logical", "weights.logical", "weights.adapter", "shard.logical"
    )

    def loaded(self, loaded: Loaded) -> None:
        inventory = loaded.inventory
        self.by_device: dict[str, int] = defaultdict(int)
        for (device, _), size in inventory.storages().items():
            self.by_device[device] += size
        distinct = list(inventory.distinct())
        self.logical = sum(held.nbytes for held in distinct)
        self.adapter = sum(held.nbytes for held in distinct if inventory.is_adapter(held))
        self.logical_by_device: dict[str, int] = defaultdict(int)
        self.logical_by_rank: dict[int, int] = defaultdict(int)
        shards = loaded.shards
        for held in distinct:
            self.logical_by_device[held.device] += held.nbytes
            if shards is not None:
                self.logical_by_rank[shards.rank_of(held.path)] += held.nbytes
        self.whole = (shards.whole_bytes if shards else 0) or sum(held.whole_bytes for held in distinct)
        #: Bytes of storages beyond the tensors that use them, as of a shard that keeps the whole tensor alive.
        self.slack = sum(self.by_device.values()) - sum(held.nbytes for held in distinct if held.device != "disk")
        unused = inventory.storages()
        for held in distinct:
            if held.storage in unused:
                unused[held.storage] -= held.nbytes
        #: The tensor whose storage has the most bytes beyond it.
        self.view = max(
            (held for held in distinct if held.storage in unused),
            key=lambda held: unused[held.storage],
            default=None,
        )

    def fill(self, result: LoadResult) -> None:
        metrics = result.metrics
        metrics["host.weights"] = self.by_device.get("cpu", 0)
        if self.job.device.kind == "cuda":
            for index in range(len(self.job.device.gpus)):
                metrics[of_gpu("gpu.weights", index)] = self.by_device.get(f"cuda:{index}", 0)
                metrics[of_gpu("gpu.logical", index)] = self.logical_by_device.get(f"cuda:{index}", 0)
            for name, sizes in (("gpu.weights", self.by_device), ("gpu.logical", self.logical_by_device)):
                metrics[name] = sum(size for device, size in sizes.items() if device.startswith("cuda:"))
        metrics["weights.logical"] = self.logical
        if self.job.spec.adapter is not None:
            metrics["weights.adapter"] = self.adapter
        for rank, size in self.logical_by_rank.items():
            metrics[f"shard.{rank}.logical"] = size
        result.whole_bytes = self.whole
        if self.slack > 0 and self.view is not None:
            result.notes.append(
                f"{SLACK}{format_bytes(self.slack)} alive beyond their elements: they are views of larger "
                f"storages, most of all {self.view.path}"
            )
