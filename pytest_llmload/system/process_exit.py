"""Describe the end of a process that a load depends on. Standard library only: every load's process imports it."""

from __future__ import annotations

import signal

from pytest_llmload.core import results
from pytest_llmload.core.results import ErrorInfo


class Died(Exception):
    """A process that the load consists of, or is served by, has died or become useless: the load is over.

    ``signal`` is the number of the signal that ended it, or 0.
    """

    def __init__(self, info: ErrorInfo, number: int = 0, outcome: str = results.CRASHED) -> None:
        super().__init__(info.message)
        self.info = info
        self.signal = number
        self.outcome = outcome


def how(status: int | None) -> str:
    """Return an exit status in words. A negative status is a signal's number; None stands for an unknown status."""
    if status is None:
        return "ended"
    return f"was killed by {signal_name(-status)}" if status < 0 else f"exited with status {status}"


def signal_name(number: int) -> str:
    """Return a signal's name; a real-time signal, for which Python lacks a name, is written as in signal(7)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        above = number - signal.SIGRTMIN
        return f"signal {number} (SIGRTMIN{above:+d})"
