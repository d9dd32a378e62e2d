"""What every probe is: something that looks at the process at fixed moments of a load."""

from __future__ import annotations

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.worker.loaded import Loaded


class Probe:
    """One thing measured. The methods are called in this order; each may do nothing.

    Between ``loaded`` and ``forwarding`` the checks run, and between ``forwarded`` and ``generating`` others read the
    logits; figures of a phase are therefore taken between its two methods.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self) -> None:
        """All is imported, no device has been touched."""

    def mark(self) -> None:
        """The device's context exists; the load comes next."""

    def loaded(self, loaded: Loaded) -> None:
        """The loading call has returned; no forward has run."""

    def forwarding(self) -> None:
        """The first forward comes next."""

    def forwarded(self, loaded: Loaded) -> None:
        """The first forward has run; ``loaded.logits`` is set unless it failed."""

    def generating(self) -> None:
        """Generating the workload comes next."""

    def generated(self, loaded: Loaded) -> None:
        """The workload was generated."""

    def fill(self, result: LoadResult) -> None:
        """Write figures, or why there are none."""

    def close(self) -> None:
        """The load is over, however it ended: give back what outlives a method. May be called twice."""
