"""The process of one load: it serves a session, and starts the further processes that a load needs."""

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
    # A session of its own, so that a kill reaches all processes that the load starts, and Ctrl-C does not.
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
    """Return the Runner for a place, made from the job, a function that is called with each phase, and the log."""
    if place == RANKS:
        from pytest_llmload.process.ranks.launcher import Ranks

        return Ranks
    if place == SERVER:
        from pytest_llmload.process.serving.served_model import ServedModel

        return ServedModel
    raise ValueError(f"a strategy declares runs_in={place!r}; use {HERE!r}, {RANKS!r} or {SERVER!r}")
