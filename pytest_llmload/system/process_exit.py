"""The end of a process that a load depends on. Standard library only: every load's process imports it."""

from __future__ import annotations

import signal

from pytest_llmload.core import results
from pytest_llmload.core.results import ErrorInfo


class Died(Exception):
    """A process that the load consists of, or is served by, is gone or of no more use: the load is over.

    ``signal`` is the number of the signal that ended it, 0 where none did.
    """

    def __init__(self, info: ErrorInfo, number: int = 0, outcome: str = results.CRASHED) -> None:
        super().__init__(info.message)
        self.info = info
        self.signal = number
        self.outcome = outcome


def how(status: int | None) -> str:
    """An exit status, minus the signal's number, in words; None if nobody saw it."""
    if status is None:
        return "ended"
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
