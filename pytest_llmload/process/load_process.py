"""The process of one load: it serves a session, and starts the processes that a load takes beside it."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from pytest_llmload.core.job import HERE, RANKS, SERVER, Job
from pytest_llmload.process.debuggers import refuse_breakpoints
from pytest_llmload.process.session import Runner, Session
from pytest_llmload.system import process
from pytest_llmload.system.protocol import Channel


def main(fd: int, log: str) -> int:
    """Serve one channel until it closes; return the process's exit status."""
    # Its own session, so that a kill reaches whatever the load starts, and Ctrl-C does not.
    os.setsid()
    process.log_to(log)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    refuse_breakpoints()
    channel = Channel(socket.socket(fileno=fd))
    session = Session(channel, lambda place, job, tell: _runner(place)(job, tell, Path(log)))
    session.serve()
    session.close()
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def _runner(place: str) -> Callable[[Job, Callable[[str], None], Path], Runner]:
    """Return what loads in other processes, made from the job, a function that is told each phase, and the log."""
    if place == RANKS:
        from pytest_llmload.process.ranks.launcher import Ranks

        return Ranks
    if place == SERVER:
        from pytest_llmload.process.serving.served_model import Served

        return Served
    raise ValueError(f"a strategy says runs_in={place!r}; known are {HERE!r}, {RANKS!r} and {SERVER!r}")
