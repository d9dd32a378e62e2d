"""Host memory of the process, as growth over a mark that is taken after the imports."""

from __future__ import annotations

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.probes.anon_sampler import AnonSampler
from pytest_llmload.worker.probes.base import Probe
from pytest_llmload.worker.probes.proc import reset_peak, rollup, status


class HostMemory(Probe):
    """``host.peak`` (VmHWM), ``host.settled`` (anonymous), ``host.file`` and the sampled ``host.anon_peak``.

    The peak's high-water mark is reset before each phase, so that what the checks read is in no figure.
    Settled and file come from ``smaps_rollup``, which counts pages: the counters in ``status`` are kept per CPU and lag
    by up to some MiB on machines with many cores.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.peaks: dict[str, int] = {}
        self.unavailable = ""

    def start(self) -> None:
        self.sampler = AnonSampler()

    def mark(self) -> None:
        self.unavailable = reset_peak()
        self.base_resident = status()["VmRSS"]
        self.base = rollup()
        self.sampler.reset()

    def loaded(self, loaded: Loaded) -> None:
        self._peak("load")
        self.after_load = rollup()

    def forwarding(self) -> None:
        reset_peak()

    def forwarded(self, loaded: Loaded) -> None:
        self._peak("forward")
        self.after_forward = rollup()

    def generating(self) -> None:
        reset_peak()

    def generated(self, loaded: Loaded) -> None:
        self._peak("generate")

    def fill(self, result: LoadResult) -> None:
        self.anon_peak, reason = self.sampler.stop()
        if self.unavailable:
            result.unavailable["host.peak"] = self.unavailable
        elif self.peaks:
            result.metrics["host.peak"] = max(self.peaks.values())
            for phase, peak in self.peaks.items():
                result.phase_peaks.setdefault(phase, {})["host"] = peak
        if reason:
            result.unavailable["host.anon_peak"] = reason
        else:
            result.metrics["host.anon_peak"] = max(0, self.anon_peak - self.base["Anonymous"])
        after = getattr(self, "after_forward", None)
        if after is None:
            result.unavailable["host.settled"] = "no forward has run"
            return
        result.metrics["host.settled"] = max(0, after["Anonymous"] - self.base["Anonymous"])
        result.metrics["host.file"] = max(0, after["File"] - self.base["File"])

    def _peak(self, phase: str) -> None:
        self.peaks[phase] = max(0, status()["VmHWM"] - self.base_resident)
