"""Describe a rank that has ended. Standard library only, since every load's process imports this module."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.system.logs import last_lines
from pytest_llmload.system.process_exit import Died, how

_LINES = 20


class RankDied(Died):
    """A rank's process ended, or the ranks are no longer in step: the load is over."""


def ended(rank: int, status: int | None, phase: str, log: Path) -> RankDied:
    """Return the error for a rank that ended, with the last lines of its log.

    ``status`` is its exit status, or minus the signal's number; None if it is unknown.
    """
    message = f"rank {rank} {how(status)} in phase '{phase}'"
    return RankDied(ErrorInfo(message=message, log=tail(rank, log), phase=phase), max(0, -(status or 0)))


def tail(rank: int, log: Path) -> str:
    """Return the last lines of a rank's log, each with the rank's name in front."""
    lines = last_lines(log, _LINES).splitlines()
    return "\n".join(f"rank {rank}: {line}" for line in lines) or f"rank {rank} printed nothing"
