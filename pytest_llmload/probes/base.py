"""The base class of probes: a probe looks at the load's process at fixed moments and writes figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.results import LoadResult

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


class Probe:
    """One thing measured. The methods are called in this order; each may do nothing.

    Between ``loaded`` and ``forwarding`` the checks run, and between ``forwarded`` and ``generating`` other code reads
    the logits; take the figures of a phase between its two methods. The module of your own probe is imported by pytest
    too, to read ``metrics``: import torch inside the methods. ::

        class Power(Probe):
            metrics = (Metric("power.joules", "J", "driver", "5%", "Energy of generating the workload"),)

            def generating(self): self.before = energy()
            def generated(self, loaded): self.joules = energy() - self.before
            def fill(self, result): result.metrics["power.joules"] = self.joules
    """

    #: Every figure that ``fill`` may write into ``result.metrics`` or ``result.unavailable``. A name that is not
    #: declared here is refused: it is dropped, and the test ends with an error that names the probe and the metric.
    metrics: ClassVar[tuple[Metric, ...]] = ()
    #: If true, ``fill`` is also called when loading raised.
    partial: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self) -> None:
        """All is imported, no device has been touched."""

    def device_ready(self) -> None:
        """The device's context exists, and no kernel has run."""

    def mark(self) -> None:
        """The load comes next; kernels of the architecture have run, and the GPU's allocator is empty again."""

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

    def finished(self, loaded: Loaded) -> None:
        """Every figure of memory and time has been taken: the model may be run again and its weights read."""

    def fill(self, result: LoadResult) -> None:
        """Write each figure into ``result.metrics``, or the reason why there is none into ``result.unavailable``."""

    def close(self) -> None:
        """The load is over, however it ended: give back what outlives a method. May be called twice."""
