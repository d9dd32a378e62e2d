"""GPU memory as the driver counts it: this process's, its context's, and a ledger of parts that add up to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named, of_gpu
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.units import format_bytes
from pytest_llmload.probes.base import Probe
from pytest_llmload.system.gpu_processes import memory_of
from pytest_llmload.worker.model.loaded import Loaded


@dataclass
class _Reading:
    """The driver's and torch's figures of one GPU at one moment, in bytes."""

    #: This process, as the driver lists it; None if it does not, with ``reason``.
    process: int | None
    reason: str
    #: All memory in use on the device.
    used: int
    allocated: int
    reserved: int


class Driver(Probe):
    """Measures ``gpu.process`` and ``gpu.context`` by NVML, and writes a ledger row for each GPU.

    GPUs are found by UUID, since NVML numbers them in its own order and ignores CUDA_VISIBLE_DEVICES. In containers
    NVML may list no process, processes of a different PID namespace, or the right one with 0 bytes: then the figure is
    unavailable, never 0. If no other process uses the GPU, the ledger then uses the growth of the device's memory in
    use since before the context was created.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named("gpu.process", "gpu.context")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        #: Why there are no figures at all; empty if there are.
        self.missing = ""
        self.handles: dict[str, Any] = {}
        self.before: dict[str, tuple[int, bool]] = {}
        self.marked: dict[int, _Reading] = {}
        self.final: dict[int, _Reading] = {}

    def start(self) -> None:
        if self.job.device.kind != "cuda":
            return
        import pynvml

        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            for gpu in self.job.device.gpus:
                handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
                self.handles[gpu.uuid] = handle
                alone = not pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
                self.before[gpu.uuid] = (int(pynvml.nvmlDeviceGetMemoryInfo(handle).used), alone)
        except pynvml.NVMLError as error:
            self.missing = f"NVML: {error}"
        if not self.missing and not self.handles:
            self.missing = "NVML does not know any of this run's GPUs"

    def device_ready(self) -> None:
        self.marked = self._read()

    def generated(self, loaded: Loaded) -> None:
        self.final = self._read()

    def fill(self, result: LoadResult) -> None:
        if self.job.device.kind != "cuda":
            return
        self._metric(result, "gpu.process", {gpu: (row.process, row.reason) for gpu, row in self.final.items()})
        contexts = {
            gpu: (row.process - row.reserved if row.process is not None else None, row.reason)
            for gpu, row in self.marked.items()
        }
        self._metric(result, "gpu.context", contexts)
        for gpu, row in self.final.items():
            self._ledger(result, gpu, row)

    def _metric(self, result: LoadResult, name: str, each: dict[int, tuple[int | None, str]]) -> None:
        """Write the sum and each GPU's figure; all are unavailable if one of them is."""
        reasons = [reason for value, reason in each.values() if value is None]
        if self.missing or not each or reasons:
            result.unavailable[name] = self.missing or next(iter(reasons), "the load did not get that far")
            return
        for gpu, (value, _) in each.items():
            result.metrics[of_gpu(name, gpu)] = value or 0
        result.metrics[name] = sum(value or 0 for value, _ in each.values())

    def _ledger(self, result: LoadResult, gpu: int, row: _Reading) -> None:
        uuid = self._uuid(gpu)
        used_before, alone = self.before[uuid]
        mark = self.marked[gpu]
        by_difference = row.process is None
        if by_difference and not alone:
            result.notes.append(f"no ledger for GPU {gpu}: {row.reason}, and other processes use it")
            return
        process = row.used - used_before if row.process is None else row.process
        context = (mark.used - used_before if mark.process is None else mark.process) - mark.reserved
        weights = int(result.metrics.get(f"gpu.{gpu}.weights", 0))
        result.ledger.append(
            {
                "gpu": gpu,
                "weights": weights,
                "rest": row.allocated - weights,
                "reserved": row.reserved - row.allocated,
                "context": context,
                "other": process - row.reserved - context,
                "process": process,
                "by_difference": float(by_difference),
            }
        )
        if by_difference:
            result.notes.append(f"GPU {gpu}: {format_bytes(process)} by the growth of the device's use ({row.reason})")

    def _read(self) -> dict[int, _Reading]:
        if self.missing or self.job.device.kind != "cuda":
            return {}
        readings = {}
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
            handle = self.handles[self._uuid(gpu)]
            reserved = torch.cuda.memory_reserved(gpu)
            process, reason = self._own(handle, reserved)
            used = int(self.nvml.nvmlDeviceGetMemoryInfo(handle).used)
            readings[gpu] = _Reading(process, reason, used, torch.cuda.memory_allocated(gpu), reserved)
        return readings

    def _own(self, handle: Any, reserved: int) -> tuple[int | None, str]:
        pid = os.getpid()
        try:
            listed = memory_of((pid,), handle)
        except self.nvml.NVMLError as error:
            return None, f"NVML: {error}"
        if not listed:
            return None, f"the driver does not list process {pid}: it is in a different PID namespace"
        used = listed[0]
        if not used:
            return None, "the driver gives no figure for this process"
        if used < reserved:
            # A different process of the host, with the same number.
            return None, "the driver's figure is smaller than what torch holds: a different PID namespace"
        return used, ""

    def _uuid(self, gpu: int) -> str:
        """Return the driver's UUID of a device as this process numbers it.

        torch knows it without NVML's prefix; older releases do not, and then the order of the devices decides.
        """
        own = str(getattr(torch.cuda.get_device_properties(gpu), "uuid", "")).lower()
        for uuid in self.handles:
            if own and uuid.partition("-")[2].lower() == own:
                return uuid
        return list(self.handles)[gpu]
