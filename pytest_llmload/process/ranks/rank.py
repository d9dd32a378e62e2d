"""One rank's process: a session of its own, over the channel to the process that started it."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
from pathlib import Path

from pytest_llmload.core.job import Job
from pytest_llmload.process.debuggers import refuse_breakpoints
from pytest_llmload.process.session import Session, prepare
from pytest_llmload.system import process
from pytest_llmload.system.protocol import Channel, Message
from pytest_llmload.worker.parallel import world


class RankSession(Session):
    """Answers as a load's process does, but loads this rank's part only."""

    def do_load(self, message: Message) -> Message:
        job = own_job(Job.from_json(message["job"]), int(os.environ["LOCAL_RANK"]))
        prepare(job)
        world.settle(job)
        return self.measured(job)

    def do_run(self, message: Message) -> Message:
        """Run a test's function. What a machine's first rank prints is the test's; that of others is in their logs."""
        printed = dict(message)
        if int(os.environ["LOCAL_RANK"]):
            printed.pop("output", None)
        return super().do_run(printed)


def own_job(job: Job, local_rank: int) -> Job:
    """Return the job with the one GPU of a rank; on a CPU run, return it unchanged."""
    if job.device.kind != "cuda":
        return job
    return dataclasses.replace(
        job, device=dataclasses.replace(job.device, gpus=job.device.gpus[local_rank : local_rank + 1])
    )


def log_of(logs: Path, local_rank: int) -> Path:
    """Return the path of the log with a rank's output."""
    return logs / f"rank{local_rank}.log"


def main(parent: int, pairs: list[tuple[socket.socket, socket.socket]], logs: Path) -> None:
    """Serve until the process that started the ranks hangs up; torch elastic calls it in a fork of that process."""
    process.die_with_parent(parent, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    local_rank = int(os.environ["LOCAL_RANK"])
    process.log_to(str(log_of(logs, local_rank)))
    refuse_breakpoints()
    own = pairs[local_rank][1]
    for pair in pairs:
        for end in pair:
            # A closed channel shows a rank's end, so that other processes must not hold it open.
            if end is not own:
                end.close()
    channel = Channel(own)
    channel.send({"kind": "hello", "pid": os.getpid(), "rank": world.rank()})
    session = RankSession(channel)
    session.serve()
    if session.loaded is not None:
        session.loaded.close()
