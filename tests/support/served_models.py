"""A served model as a load's process has it, in the process of the tests."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from pytest_llmload.core.job import Job
from pytest_llmload.process.serving.served_model import ServedModel


@contextlib.contextmanager
def client(job: Job, folder: Path) -> Iterator[ServedModel]:
    """Open the served model of a job, whose server's log lies in ``folder``; close it in the end."""
    # What a load's process does with this signal is no business of the one that runs the tests.
    before = signal.getsignal(signal.SIGUSR1)
    served = ServedModel(job, lambda phase: None, folder / "load.log")
    try:
        yield served
    finally:
        served.close()
        signal.signal(signal.SIGUSR1, before)
