"""Bytes of the model's weights, exact: distinct live storages on each side, before any forward."""

from __future__ import annotations

from collections import defaultdict

from pytest_llmload.core.results import LoadResult
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.probes.base import Probe


class Weights(Probe):
    """``gpu.weights``, ``host.weights``, ``weights.logical``, ``weights.adapter`` and ``whole_bytes``."""

    def loaded(self, loaded: Loaded) -> None:
        inventory = loaded.inventory
        self.by_device: dict[str, int] = defaultdict(int)
        for (device, _), size in inventory.storages().items():
            self.by_device[device] += size
        distinct = list(inventory.distinct())
        self.logical = sum(held.nbytes for held in distinct)
        self.adapter = sum(held.nbytes for held in distinct if inventory.is_adapter(held))
        self.whole = sum(held.whole_bytes for held in distinct)
        #: What a storage holds beyond the tensors that use it: a shard that keeps the whole tensor alive.
        self.slack = sum(self.by_device.values()) - sum(held.nbytes for held in distinct if held.device != "disk")

    def fill(self, result: LoadResult) -> None:
        metrics = result.metrics
        metrics["host.weights"] = self.by_device.get("cpu", 0)
        if self.job.device.kind == "cuda":
            gpus = {name.split(":")[1]: size for name, size in self.by_device.items() if name.startswith("cuda:")}
            for index in range(max(self.job.spec.gpu_count, 1)):
                metrics[f"gpu.{index}.weights"] = gpus.get(str(index), 0)
            metrics["gpu.weights"] = sum(gpus.values())
        metrics["weights.logical"] = self.logical
        if self.job.spec.adapter is not None:
            metrics["weights.adapter"] = self.adapter
        result.whole_bytes = self.whole
        if self.slack > 0:
            result.notes.append(
                f"weights keep {self.slack} bytes alive beyond their elements: views of larger storages"
            )
