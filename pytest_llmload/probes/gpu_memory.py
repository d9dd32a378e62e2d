"""GPU memory as torch's caching allocator counts it."""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named, of_gpu
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.model.loaded import Loaded

#: Cumulative counters of ``torch.cuda.memory_stats``: a transient copy shows here even if a warm-up allocation of the
#: whole model's size hides it from every peak (transformers, ``caching_allocator_warmup``). Bytes are those requested:
#: a block may be up to 1 MiB larger, and which blocks are depends on the order in which threads allocate.
_EVER_BYTES = "requested_bytes.all.allocated"
_EVER_COUNT = "allocation.all.allocated"


class GpuMemory(Probe):
    """Measures settled memory, peaks per phase, and all allocations of the load, in bytes for each visible GPU.

    Sums are under ``gpu.*``. A sum of peaks adds up each GPU's own peak; they need not occur at the same moment.
    Nothing is measured on a CPU run.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named(
        "gpu.load_allocated",
        "gpu.load_allocations",
        "gpu.settled",
        "gpu.load_peak",
        "gpu.forward_peak",
        "gpu.generate_peak",
        "gpu.reserved_peak",
    )

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.gpus: list[int] = []
        #: Metric -> GPU -> value.
        self.figures: dict[str, dict[int, float]] = defaultdict(dict)
        self.reserved: dict[str, dict[int, int]] = {}

    def mark(self) -> None:
        if self.job.device.kind != "cuda":
            return
        self.gpus = list(range(torch.cuda.device_count()))
        self._reset()
        self.before = {gpu: self._ever(gpu) for gpu in self.gpus}

    def loaded(self, loaded: Loaded) -> None:
        self._peaks("load", "gpu.load_peak")
        for gpu in self.gpus:
            size, count = self._ever(gpu)
            self.figures["gpu.load_allocated"][gpu] = size - self.before[gpu][0]
            self.figures["gpu.load_allocations"][gpu] = count - self.before[gpu][1]
            self.figures["gpu.settled"][gpu] = torch.cuda.memory_allocated(gpu)

    def forwarding(self) -> None:
        self._reset()

    def forwarded(self, loaded: Loaded) -> None:
        self._peaks("forward", "gpu.forward_peak")

    def generating(self) -> None:
        self._reset()

    def generated(self, loaded: Loaded) -> None:
        self._peaks("generate", "gpu.generate_peak")

    def fill(self, result: LoadResult) -> None:
        if not self.gpus:
            return
        for phase, peaks in self.reserved.items():
            result.phase_peaks.setdefault(phase, {}).update({f"gpu.{gpu}": peak for gpu, peak in peaks.items()})
        self.figures["gpu.reserved_peak"] = {
            gpu: max(peaks[gpu] for peaks in self.reserved.values()) for gpu in self.gpus if self.reserved
        }
        for name, each in self.figures.items():
            if each:
                result.metrics[name] = sum(each.values())
                result.metrics.update({of_gpu(name, gpu): value for gpu, value in each.items()})

    def _ever(self, gpu: int) -> tuple[int, int]:
        stats = torch.cuda.memory_stats(gpu)
        return int(stats.get(_EVER_BYTES, 0)), int(stats.get(_EVER_COUNT, 0))

    def _reset(self) -> None:
        """Reset the peaks of every device; without a device, ``reset_peak_memory_stats()`` resets the current one."""
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)

    def _peaks(self, phase: str, metric: str) -> None:
        for gpu in self.gpus:
            torch.cuda.synchronize(gpu)
            self.figures[metric][gpu] = torch.cuda.max_memory_allocated(gpu)
        if self.gpus:
            self.reserved[phase] = {gpu: torch.cuda.max_memory_reserved(gpu) for gpu in self.gpus}
