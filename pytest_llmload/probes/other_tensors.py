"""Live tensors after the load that are not part of the model, such as a copy that some code keeps."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from typing import Any, ClassVar

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named, of_gpu
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.units import format_bytes
from pytest_llmload.probes.base import Probe
from pytest_llmload.probes.holders import holders
from pytest_llmload.system.garbage import all_listed
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import inner_tensors, local_part

#: How many of the tensors are named, the largest first.
_NAMED = 5
#: Bytes below which a tensor is counted but not named: libraries keep code tables.
_WORTH = 2048


class OtherTensors(Probe):
    """Measures ``gpu.other_tensors`` and ``host.other_tensors``: bytes of Python's live tensors outside the model.

    They are counted before the first forward, and are exact, unlike a peak: a second copy of one weight shows on the
    CPU too. Tensors that only C++ code holds (cuBLAS workspaces) are not seen.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named("gpu.other_tensors", "host.other_tensors")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.earlier: list[weakref.ref[Any]] = []
        self.bytes: dict[str, int] = defaultdict(int)
        self.notes: list[str] = []

    def mark(self) -> None:
        # By reference, since an address may be used again.
        self.earlier = [weakref.ref(tensor) for tensor in live_tensors()]

    def loaded(self, loaded: Loaded) -> None:
        found = live_tensors()
        known = set(loaded.inventory.storages())
        for reference in self.earlier:
            tensor = reference()
            if tensor is not None:
                known |= {key for key, _ in storages(tensor)}
        others: dict[tuple[str, int], tuple[int, Any]] = {}
        for tensor in found:
            for key, size in storages(tensor):
                if key not in known and key[0] != "meta" and size:
                    others[key] = (size, tensor)
        for (device, _), (size, _) in others.items():
            self.bytes[device.split(":")[0]] += size
            if device.startswith("cuda:"):
                self.bytes[device] += size
        largest = sorted((item for item in others.items() if item[1][0] >= _WORTH), key=lambda item: -item[1][0])[
            :_NAMED
        ]
        if not largest:
            return
        # Objects from before the load may hold them, and are frozen.
        with all_listed():
            held_by = holders([tensor for _, (_, tensor) in largest])
        self.notes = [
            f"a tensor that is not part of the model is alive: {str(tensor.dtype).removeprefix('torch.')}"
            f"{list(tensor.shape)} on {device} ({format_bytes(size)}), held by {name}"
            for ((device, _), (size, tensor)), name in zip(largest, held_by, strict=True)
        ]

    def fill(self, result: LoadResult) -> None:
        result.metrics["host.other_tensors"] = self.bytes.get("cpu", 0)
        if self.job.device.kind == "cuda":
            result.metrics["gpu.other_tensors"] = self.bytes.get("cuda", 0)
            for index in range(torch.cuda.device_count()):
                result.metrics[of_gpu("gpu.other_tensors", index)] = self.bytes.get(f"cuda:{index}", 0)
        result.notes += self.notes


def live_tensors() -> list[Any]:
    """Return every tensor that Python holds, except those that the garbage collector has frozen."""
    # issubclass of the type, since proxies answer isinstance by loading the object that they stand for.
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def storages(tensor: Any) -> list[tuple[tuple[str, int], int]]:
    """Return the storages behind a tensor: ((device, address), bytes) for each.

    A tensor without a storage (fake and functional tensors) has none.
    """
    part = local_part(tensor)
    inner = inner_tensors(part)
    if inner:
        return [entry for _, leaf in inner for entry in storages(leaf)]
    if part.layout != torch.strided or torch._is_functional_tensor(part):
        return []
    storage = part.untyped_storage()
    # A fake tensor, as torch.compile leaves them, names a device and holds nothing.
    if storage.device.type == "meta":
        return []
    return [((str(part.device), storage.data_ptr()), storage.nbytes())]
