"""Host memory of the process, as growth over a mark that is taken after the imports."""

from __future__ import annotations

import time
from typing import ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.anon_sampler import AnonSampler
from pytest_llmload.probes.base import Probe
from pytest_llmload.system import allocator
from pytest_llmload.system.proc import libraries, reset_peak, rollup, status
from pytest_llmload.worker.model.loaded import Loaded


class HostMemory(Probe):
    """Measures ``host.peak``, ``host.settled``, ``host.file`` and the sampled ``host.anon_peak``, in bytes.

    ``host.peak`` is VmHWM without mapped libraries, ``host.settled`` is anonymous memory. Peaks are measured per phase,
    so that memory that the checks read is not part of a figure. Settled and file come from ``smaps_rollup``, which
    counts pages: the counters in ``status`` are kept per CPU and lag by up to some MiB on machines with many cores.

    The allocator stays pinned until the workload has been generated. If it is not pinned, temporaries of forward and
    generate come from a heap that fragments differently in each process: among eight clean nf4 loads that peak at
    31 MiB, one peaked at 38 to 53 MiB.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named("host.peak", "host.settled", "host.anon_peak", "host.file")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        #: Phase -> highest growth over the mark in bytes: resident, and (sampled) anonymous memory.
        self.peaks: dict[str, int] = {}
        self.anon_peaks: dict[str, int] = {}
        self.sampler: AnonSampler | None = None
        self.complaint = ""
        self.unavailable = ""
        self.settled: dict[str, int] | None = None
        #: When the loading call began (``time.monotonic``), and the anonymous growth since then.
        self.began = 0.0
        self.timeline: list[list[float]] = []

    def start(self) -> None:
        self.sampler = AnonSampler()
        self.malloc = allocator.pin()

    def mark(self) -> None:
        self.base_resident = status()["VmRSS"]
        try:
            self.base_libraries = libraries()
        except OSError as error:
            self.unavailable = f"the kernel does not show the resident pages of libraries: {error}"
        self.base = rollup()
        self._reset()

    def loading(self) -> None:
        self.began = time.monotonic()

    def loaded(self, loaded: Loaded) -> None:
        self._end("load")
        if self.sampler is not None:
            self.timeline = [
                [moment - self.began, max(0, size - self.base["Anonymous"])]
                for moment, size in self.sampler.series
                if moment >= self.began
            ]

    def forwarding(self) -> None:
        self._begin()

    def forwarded(self, loaded: Loaded) -> None:
        self._end("forward")
        allocator.trim()
        self.settled = rollup()

    def generating(self) -> None:
        self._begin()

    def generated(self, loaded: Loaded) -> None:
        self._end("generate")
        # Times are measured next, without the sampler and never with the pinned allocator.
        self.close()

    def close(self) -> None:
        if self.sampler is not None:
            self.complaint = self.sampler.close()
            self.sampler = None
            allocator.unpin()

    def fill(self, result: LoadResult) -> None:
        self.close()
        result.environment["malloc"] = self.malloc
        if self.timeline:
            result.timeline["host"] = self.timeline
        if self.unavailable:
            result.unavailable["host.peak"] = self.unavailable
        elif self.peaks:
            result.metrics["host.peak"] = max(self.peaks.values())
            for phase, peak in self.peaks.items():
                result.phase_peaks.setdefault(phase, {})["host"] = peak
        if self.anon_peaks and not self.complaint:
            result.metrics["host.anon_peak"] = max(self.anon_peaks.values())
        else:
            reason = self.complaint or "it printed no reason"
            result.unavailable["host.anon_peak"] = f"the sampling process ended: {reason}"
        if self.settled is None:
            result.unavailable |= dict.fromkeys(("host.settled", "host.file"), "no forward has run")
        else:
            result.metrics["host.settled"] = max(0, self.settled["Anonymous"] - self.base["Anonymous"])
            result.metrics["host.file"] = max(0, self.settled["File"] - self.base["File"])

    def _begin(self) -> None:
        # Memory that the checks freed in between must not be part of a phase's peak.
        allocator.trim()
        self._reset()

    def _reset(self) -> None:
        self.unavailable = self.unavailable or reset_peak()
        if self.sampler is not None:
            self.sampler.take()

    def _end(self, phase: str) -> None:
        if not self.unavailable:
            peak = status()["VmHWM"]
            paged_in = libraries() - self.base_libraries
            self.peaks[phase] = max(0, peak - self.base_resident - paged_in)
        anonymous = self.sampler.take() if self.sampler is not None else None
        if anonymous is not None:
            self.anon_peaks[phase] = max(0, anonymous - self.base["Anonymous"])
