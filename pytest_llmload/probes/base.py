"""What every probe is: something that looks at the process at fixed moments of a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


class Probe:
    """One thing measured. The methods are called in this order; each may do nothing.

    Between ``loaded`` and ``forwarding`` the checks run, and between ``forwarded`` and ``generating`` others read the
    logits; figures of a phase are therefore taken between its two methods.
    """

    #: Whether ``fill`` is asked for also where the load raised.
    partial: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self) -> None:
        """All is imported, no device has been touched."""

    def mark(self) -> None:
        """The device's context exists; the load comes next."""

    def loading(self) -> None:
        """The loading call comes next, and is timed from here."""

    def returned(self) -> None:
        """The loading call has returned; what strategies do to the model comes next, in the same time."""

    def loaded(self, loaded: Loaded) -> None:
        """The model is loaded, and garbage is collected; no forward has run."""

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
