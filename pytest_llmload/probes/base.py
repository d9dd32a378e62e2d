"""The base class of probes: a probe measures in the load's process at fixed moments, and writes figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.results import LoadResult

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


class Probe:
    """Measures one thing. The methods are called in the order below; override those that you need.

    Between ``loaded`` and ``forwarding`` the checks run, and between ``forwarded`` and ``generating`` other code reads
    the logits, so measure a phase between its own two methods. pytest imports the module of your probe too, to read
    ``metrics``: import torch inside the methods. ::

        class Power(Probe):
            metrics = (Metric("power.joules", "J", "driver", "5%", "Energy of generating the workload"),)

            def generating(self): self.before = energy()
            def generated(self, loaded): self.joules = energy() - self.before
            def fill(self, result): result.metrics["power.joules"] = self.joules
    """

    #: Every figure that ``fill`` may write into ``result.metrics`` or ``result.unavailable``. An undeclared figure is
    #: dropped, and the test ends with an error that names the probe and the metric.
    metrics: ClassVar[tuple[Metric, ...]] = ()
    #: If true, ``fill`` is also called when loading raised.
    partial: ClassVar[bool] = False

    def __init__(self, job: Job) -> None:
        self.job = job

    def start(self) -> None:
        """Act after all imports, before any device is touched."""

    def device_ready(self) -> None:
        """Act after the device's context has been created, before any kernel runs."""

    def mark(self) -> None:
        """Act before the load; kernels of the architecture have run, and the GPU's allocator is empty again."""

    def loading(self) -> None:
        """Act immediately before the loading call; its time starts after this method."""

    def returned(self) -> None:
        """Act after the loading call; strategies change the model next, in the same measured time."""

    def loaded(self, loaded: Loaded) -> None:
        """Act after the load and a garbage collection, before the first forward."""

    def forwarding(self) -> None:
        """Act immediately before the first forward."""

    def forwarded(self, loaded: Loaded) -> None:
        """Act after the first forward; ``loaded.logits`` is set unless it failed."""

    def generating(self) -> None:
        """Act immediately before the workload is generated."""

    def generated(self, loaded: Loaded) -> None:
        """Act after the workload has been generated."""

    def finished(self, loaded: Loaded) -> None:
        """Act after all memory and time has been measured: the model may be run again and its weights may be read."""

    def fill(self, result: LoadResult) -> None:
        """Write each figure, in its metric's unit, into ``result.metrics``.

        A figure that is missing has its reason in ``result.unavailable``.
        """

    def close(self) -> None:
        """Release all resources; called after every load, also one that failed. May be called twice."""
