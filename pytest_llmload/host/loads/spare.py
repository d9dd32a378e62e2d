"""A load process that is prepared while the load before it is measured.

On a GPU, a process needs some two seconds before it can load: for its context, and for the first use of each kernel.
These seconds are not part of any measurement, so they may pass during a different load. The spare itself holds the
locks of its GPUs, from the moment they are handed to it until it ends, and it ends by itself if it is not asked to
load: other runs on the machine never meet a GPU that is in use and not locked.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from pytest_llmload.core.job import Job
from pytest_llmload.host.loads.gpu_leases import Lease
from pytest_llmload.host.loads.processes import LoadDied, LoadProcess

#: Seconds that a spare gets for its imports, its context and its kernels.
_READY = 120.0
#: Seconds that a spare waits for its load, in which it holds its GPUs, before it ends by itself.
IDLE = 30.0


class Spare:
    """The spare process of a run; at most one at a time."""

    def __init__(self, idle: float = IDLE) -> None:
        self._idle = idle
        self._process: LoadProcess | None = None
        #: The load that the spare is for; None while there is no spare.
        self.job: Job | None = None
        #: True once a spare died; then no further one is made, since a GPU may allow only one process.
        self._failed = False

    @property
    def pid(self) -> int:
        """Return the process id; 0 while there is no spare."""
        return self._process.pid if self._process is not None else 0

    def make(self, job: Job, descriptors: tuple[int, ...], fork: Callable[[], LoadProcess | str]) -> None:
        """Prepare a process for a job, unless there is one already; :meth:`take` reads its answer.

        ``descriptors`` are the locks of the job's GPUs.
        """
        if self._failed or self._process is not None:
            return
        process = fork()
        if isinstance(process, LoadProcess):
            process.send({"kind": "ready", "job": job.to_json(), "idle": self._idle}, descriptors)
            self._process, self.job = process, job

    def take(self, job: Job) -> tuple[LoadProcess, Lease] | None:
        """Return the spare and its GPUs if it was made for this job and still runs; else end it and return None."""
        process, expected = self._process, self.job
        if process is None or expected != job:
            self.discard()
            return None
        ready = False
        try:
            ready = process.reply(_READY)["kind"] == "ready"
            claimed = ready and process.request({"kind": "claim"}, _READY)["kind"] == "claimed"
        except LoadDied:
            claimed = False
            self._failed |= not ready
        if not claimed:
            # If there is a cause for its failure, the load itself will meet it and report it to the tests.
            self.discard()
            return None
        self._process = self.job = None
        locks = [socket.socket(fileno=descriptor) for descriptor in process.received]
        process.received.clear()
        return process, Lease(job.device.gpus, locks)

    def discard(self) -> None:
        """End the spare, if there is one."""
        if self._process is not None:
            self._process.kill()
        self._process = self.job = None
