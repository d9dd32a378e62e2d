"""Decide whether a process is prepared while a load is measured, and for which load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_llmload.core.job import WITHOUT_TIMES, Device, Gpu, Job, Scope
from pytest_llmload.host.loads import hardware

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.expected_loads import ExpectedLoads

#: Largest share of a GPU that the weights of a load may take if a further process is prepared at the same time.
_BESIDE = 0.25
#: The first phases of a load in which its context exists: without and with a process prepared for it.
_WITH_CONTEXT = ("warm_up", "page_cache")


class SparePolicy:
    """The rules for :class:`Spares`.

    No process is prepared while a load is timed, nor if the driver hides which processes use a GPU, since a spare would
    be mistaken for a foreign process; nor under pytest-xdist if a worker could wait for a GPU that a spare holds; and
    only if its context and one layer fit next to the load with room to spare. A spare is forked, and it gets the GPUs
    and the files of the load beside it.
    """

    def __init__(
        self,
        expected: ExpectedLoads,
        device: Callable[[], Device],
        *,
        predicts: bool,
        runs_elsewhere: Callable[[LoadSpec], bool],
        gpus_needed: Callable[[LoadSpec], int],
        forks: Callable[[LoadSpec], bool],
    ) -> None:
        """Prepare for a run.

        Args:
            expected: The loads that the tests will ask for.
            device: Returns the device of this run.
            predicts: True if loads are traced for a device that is not here.
            runs_elsewhere: Returns whether a load's model is in different processes from the one that serves it.
            gpus_needed: Returns how many GPUs a load needs; asked only for loads that do not run elsewhere.
            forks: Returns whether a load's process can be forked.
        """
        self._expected = expected
        self._device = device
        self._predicts = predicts
        self._runs_elsewhere = runs_elsewhere
        self._gpus_needed = gpus_needed
        self._forks = forks

    def next_load(
        self, phase: str, pid: int, job: Job, scope: Scope, gpus: Sequence[Gpu], prepared: Iterable[LoadSpec]
    ) -> LoadSpec | None:
        """Return the load to prepare a process for, or None. Raises MachineError if the driver does not tell.

        Args:
            phase: The phase that the load which is measured enters.
            pid: Its process.
            job: The load itself.
            scope: What it measures, and what the next one would.
            gpus: Its GPUs, which the next one would use.
            prepared: The loads that processes are prepared for already, in order.
        """
        if phase not in _WITH_CONTEXT or not self._may_overlap(job, scope, gpus):
            return None
        if not all(hardware.used_by(gpu, pid) for gpu in gpus):
            return None
        spec = self._expected.after(job.spec, prepared)
        return spec if spec is not None and self._has_same_place(spec, job, gpus) else None

    def _may_overlap(self, job: Job, scope: Scope, gpus: Sequence[Gpu]) -> bool:
        """Return whether the measured load allows another process on its GPUs."""
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        if self._predicts or scope != WITHOUT_TIMES or not gpus or workers > len(self._device().gpus):
            return False
        return job.checkpoint.bytes <= _BESIDE * min(gpu.total for gpu in gpus)

    def _has_same_place(self, spec: LoadSpec, job: Job, gpus: Sequence[Gpu]) -> bool:
        """Return whether a fork can load ``spec`` with the files and the GPUs of ``job``."""
        return (
            spec.model == job.spec.model
            and spec.adapter in (None, job.spec.adapter)
            and not self._runs_elsewhere(spec)
            and self._gpus_needed(spec) == len(gpus)
            and self._forks(spec)
        )
