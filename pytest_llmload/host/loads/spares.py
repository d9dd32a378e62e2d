"""Load processes that are prepared while the loads before them are measured.

On a GPU, a process needs some two seconds before it can load: for its context, and for the first use of each kernel.
These seconds are not part of any measurement, so they may pass during a different load. A small load is measured in
less time than the next process needs, so that two are prepared at a time. A spare itself holds the locks of its GPUs,
from the moment they are handed to it until it ends, and it ends by itself if it is not asked to load: other runs on the
machine never meet a GPU that is in use and not locked.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Job
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.loads.gpu_leases import Lease
from pytest_llmload.host.loads.processes import LoadDied, LoadProcess

#: Spares at the same time, and the cores that each of them needs besides those of the load that is measured.
_MOST = 2
_CORES = 4
#: Seconds that a spare gets for its imports, its context and its kernels.
_READY = 120.0
#: Seconds that a spare waits for its load, in which it holds its GPUs, before it ends by itself.
IDLE = 30.0


def most() -> int:
    """Return how many processes may be prepared at the same time on this machine; at least one."""
    return max(1, min(_MOST, len(os.sched_getaffinity(0)) // _CORES))


class Spares:
    """The spare processes of a run, in the order in which their loads are expected."""

    def __init__(self, idle: float = IDLE, limit: int | None = None) -> None:
        self._idle = idle
        self._limit = most() if limit is None else limit
        self._waiting: deque[tuple[LoadProcess, Job]] = deque()
        #: True once a spare died; then no further one is made, since a GPU may allow only one process.
        self._failed = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def pids(self) -> set[int]:
        """Return the process ids of the spares."""
        return {process.pid for process, _ in self._waiting}

    @property
    def specs(self) -> list[LoadSpec]:
        """Return the specs of the loads that the spares are for, in order."""
        return [job.spec for _, job in self._waiting]

    @property
    def next_job(self) -> Job | None:
        """Return the load that the first spare is for; None while there is no spare."""
        return self._waiting[0][1] if self._waiting else None

    def make(self, job: Job, descriptors: tuple[int, ...], fork: Callable[[], LoadProcess | str]) -> None:
        """Prepare a process for a job, unless there are enough already; :meth:`take` reads its answer.

        ``descriptors`` are the locks of the job's GPUs.
        """
        if self._failed or len(self._waiting) == self._limit:
            return
        process = fork()
        if isinstance(process, LoadProcess):
            try:
                process.send({"kind": "ready", "job": job.to_json(), "idle": self._idle}, descriptors)
                self._waiting.append((process, job))
            except BaseException:
                # Ctrl-C, pytest-timeout: it would hold its GPUs, and no load would be asked of it.
                process.kill()
                raise

    def take(self, job: Job) -> tuple[LoadProcess, Lease] | None:
        """Return the first spare and its GPUs if it was made for this job and still runs; else end all, return None."""
        if self.next_job != job:
            self.discard()
            return None
        # Ctrl-C and pytest-timeout kill it while it is waited for.
        process, _ = self._waiting.popleft()
        ready = claimed = False
        try:
            ready = process.reply(_READY)["kind"] == "ready"
            claimed = ready and process.request({"kind": "claim"}, _READY)["kind"] == "claimed"
        except LoadDied:
            self._failed |= not ready
        except MachineError:
            # The server that it was forked from died: the load is forked from a new one.
            pass
        if not claimed:
            # If there is a cause for its failure, the load itself will meet it and report it to the tests.
            process.kill()
            self.discard()
            return None
        locks = [socket.socket(fileno=descriptor) for descriptor in process.received]
        process.received.clear()
        return process, Lease(job.device.gpus, locks)

    def discard(self) -> None:
        """End the spares, all at once: the kernel needs a while to take the context of each apart."""
        for process, _ in self._waiting:
            process.hang_up()
        while self._waiting:
            self._waiting.popleft()[0].kill()
