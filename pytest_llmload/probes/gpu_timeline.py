"""GPU memory over time while a load runs, for the report.

A thread reads torch's allocator every few milliseconds. It allocates nothing on a GPU, so that it does not change any
figure of memory or of allocations; one sample takes the interpreter for some ten microseconds.
"""

from __future__ import annotations

from time import perf_counter

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.load_sampler import LoadSampler
from pytest_llmload.probes.series import POINTS, Series

#: Seconds between two samples.
INTERVAL = 0.02


class GpuTimeline(LoadSampler):
    """Fills ``timeline`` for each visible GPU: seconds since the loading call began, and allocated bytes.

    For a load that raised, the timeline ends at the error. Nothing is measured on a CPU run.
    """

    thread_name = "memory over time"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._began = 0.0
        self._series: dict[str, Series] = {}

    def start(self) -> None:
        if self.job.device.kind == "cuda":
            super().start()

    def mark(self) -> None:
        if self.thread is not None:
            self._series = {f"gpu.{gpu}": Series(POINTS) for gpu in range(torch.cuda.device_count())}

    def loading(self) -> None:
        self._began = perf_counter()
        self.begun.set()

    def fill(self, result: LoadResult) -> None:
        self.close()
        for place, series in self._series.items():
            if series.points:
                result.timeline[place] = [[moment, size] for moment, size in series.points]

    def sample(self) -> None:
        self.begun.wait()
        # One more sample once the load is over, so that the line ends where the load did.
        is_last = not self._began
        while not is_last:
            is_last = self.ended.wait(INTERVAL)
            now = perf_counter() - self._began
            for gpu, series in enumerate(self._series.values()):
                series.add(now, torch.cuda.memory_stats_as_nested_dict(gpu)["allocated_bytes"]["all"]["current"])
