"""A map that keeps each device under a limit."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.strategies.base import Strategy, from_pretrained
from pytest_llmload.worker.strategies.device_map import library_keys

if TYPE_CHECKING:
    from pytest_llmload.worker.loaded import Loaded


class MaxMemory(Strategy):
    """``infer_auto_device_map(max_memory=…)`` from accelerate, then a load with that map."""

    name = "max_memory"
    summary = "accelerate's map under a limit per device; what does not fit goes to the CPU and to disk."
    fields: ClassVar[dict[str, Any]] = {"strategy": "max_memory"}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        # Part of the load, since production pays for the map too: it took a minute in some versions.
        self.limits = memory_limits(job)
        return load_with_map(job, kwargs, inferred_map(job, self.limits))

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        return over_limit(loaded, self.limits)


def memory_limits(job: Job) -> dict[str, int]:
    """The spec's limits in bytes, else a default that makes every device take part."""
    if job.spec.max_memory:
        return dict(job.spec.max_memory)
    from pytest_llmload.worker.placement import default_max_memory

    return default_max_memory(job, job.checkpoint.bytes)


def inferred_map(job: Job, limits: dict[str, int]) -> dict[str, Any]:
    """accelerate's map for the model as it will be stored: quantised weights count with their packed size."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import CustomDtype

    from pytest_llmload.worker.quantisable import quantisable
    from pytest_llmload.worker.skeleton import skeleton
    from pytest_llmload.worker.tensors import Inventory

    if job.spec.device_map is not None:
        return dict(json.loads(job.spec.device_map))
    model = skeleton(job)
    packed: dict[str, Any] = {}
    if job.spec.quant != "none":
        import torch

        dtype = torch.int8 if job.spec.quant == "int8" else CustomDtype.INT4
        packed = {weight.name: dtype for weight in quantisable(model, Inventory(model)) if weight.kind != "experts"}
    return dict(
        infer_auto_device_map(
            model,
            max_memory=library_keys(limits),
            no_split_module_classes=list(getattr(model, "_no_split_modules", None) or ()),
            special_dtypes=packed or None,
        )
    )


def load_with_map(job: Job, kwargs: dict[str, Any], device_map: dict[str, Any]) -> Loaded:
    """A load with a map of modules that may name ``cpu`` and ``disk``; the plan is kept for the checks."""
    folder = tempfile.TemporaryDirectory(prefix="llmload-offload-")
    options = {"device_map": device_map, "offload_folder": folder.name, **kwargs}
    loaded = from_pretrained(job, options)
    loaded.planned_map = device_map
    # Weights on disk are read from it at every forward.
    loaded.resources.append(folder)
    return loaded


def over_limit(loaded: Loaded, limits: dict[str, int]) -> Iterator[Problem]:
    """Devices that hold more weights than their limit."""
    held: dict[str, int] = defaultdict(int)
    for (device, _), size in loaded.inventory.storages().items():
        held[device.removeprefix("cuda:")] += size
    for device, limit in limits.items():
        if held[device] > limit:
            yield Problem(
                "max_memory",
                f"device {device} holds {format_bytes(held[device])} of weights, its limit is {format_bytes(limit)}",
                bytes=held[device] - limit,
            )
