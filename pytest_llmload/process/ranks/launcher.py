"""The process of a load in ranks: it starts them, passes requests to all of them, and ends at the first failure."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_llmload.core import results
from pytest_llmload.core.errors import MACHINE_ERRORS
from pytest_llmload.core.job import Job
from pytest_llmload.core.results import ErrorInfo, LoadResult
from pytest_llmload.process.job_strategies import strategies
from pytest_llmload.process.load_imports import import_all
from pytest_llmload.process.ranks.agent import Agent
from pytest_llmload.process.ranks.failures import RankDied, ended, tail
from pytest_llmload.process.ranks.merge import merge
from pytest_llmload.process.ranks.rank import log_of
from pytest_llmload.system.logs import last_lines
from pytest_llmload.system.nodes import local_size
from pytest_llmload.system.protocol import Channel, Closed, Message

#: Seconds in which the other ranks must answer once one of them has raised: they may be raising the same exception, or
#: waiting for it in a collective operation, from which they never return.
_GRACE = 3.0
#: Seconds between two checks that the agent that starts the ranks is still running.
_LOOK = 0.2
#: Seconds for torch elastic to see that a rank has ended.
_SEEN = 10.0
#: The most lines of a rank's stack that are reported.
_STACK_LINES = 9
_STACKS = 1000


class Ranks:
    """The ranks of one load on this machine, and the channels to them."""

    def __init__(self, job: Job, tell: Callable[[str], None], log: Path) -> None:
        # Once for all ranks, which are forked from this process.
        tell("import")
        import_all(job, strategies(job), cold=False)
        logs = Path(f"{log}.ranks")
        self._job = job
        self._tell = tell
        self._logs = logs
        self._count = local_size(job.spec.world_size)
        logs.mkdir()
        pairs = [socket.socketpair() for _ in range(self._count)]
        self._channels = [Channel(ours) for ours, _ in pairs]
        self._phases = ["start"] * self._count
        self._told = ""
        #: The ranks' numbers among those of all machines; until the ranks report them, those of the first machine.
        self._names = list(range(self._count))
        #: Local rank -> a descriptor of its process, since the number may belong to a different process by now.
        self._processes: dict[int, int] = {}
        # Replaces the dump of this process's own stack, which only waits.
        faulthandler.unregister(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, self._dump)
        self._agent = Agent(self._count, pairs, logs)
        self._agent.start()
        for rank, hello in enumerate(self._collect(lambda message: message["kind"] == "hello")):
            self._names[rank], self._processes[rank] = hello["rank"], os.pidfd_open(hello["pid"])
        for _, theirs in pairs:
            # From now on only the rank itself holds its end of the channel, and its death closes it.
            theirs.close()

    def load(self) -> LoadResult:
        """Load and measure in all ranks; return one merged result. Raises RankDied if a rank ends or raises."""
        replies = self._ask({"kind": "load", "job": self._job.to_json()})
        if any(reply["kind"] == "error" for reply in replies):
            raise self._raised(dict(enumerate(replies)))
        results = [LoadResult.from_json(reply["result"]) for reply in replies]
        return merge(self._job, dict(zip(self._names, results, strict=True)))

    def ask(self, message: Message) -> Message:
        """Send a message to all ranks, as collective operations require; return the first rank's reply.

        If a rank raised, return the reply of the first one that did. Raises RankDied if one does not answer.
        """
        replies = self._ask(message)
        reply = next((reply for reply in replies if reply["kind"] == "error"), replies[0])
        return {**reply, "changed": any(other.get("changed") for other in replies)}

    def _ask(self, message: Message) -> list[Message]:
        for rank, channel in enumerate(self._channels):
            try:
                channel.send(message)
            except Closed:
                raise self._death(rank) from None
        return self._collect(lambda reply: reply["kind"] != "phase")

    def _collect(self, wanted: Callable[[Message], bool]) -> list[Message]:
        """Return one wanted message from each rank, in their order; report each phase when the last rank enters it."""
        found: dict[int, Message] = {}
        deadline: float | None = None
        while len(found) < self._count:
            if deadline is not None and time.monotonic() > deadline:
                raise self._out_of_step(found)
            waiting = {self._channels[rank].socket: rank for rank in range(self._count) if rank not in found}
            ready, _, _ = select.select(list(waiting), [], [], _LOOK)
            if not ready and not self._agent.alive:
                raise self._agent_ended(min(waiting.values()))
            for rank in sorted(waiting[sock] for sock in ready):
                message = self._next(rank, wanted)
                if message is not None:
                    found[rank] = message
                    if message["kind"] == "error" and deadline is None:
                        deadline = time.monotonic() + _GRACE
        return [found[rank] for rank in range(self._count)]

    def _next(self, rank: int, wanted: Callable[[Message], bool]) -> Message | None:
        """Return the message that a rank has sent; None if it is not a wanted one."""
        channel = self._channels[rank]
        more = True
        while more:
            try:
                message, _ = channel.receive()
            except Closed:
                raise self._death(rank) from None
            if wanted(message):
                return message
            if message["kind"] == "phase":
                self._entered(rank, message["phase"])
            more = channel.has_message
        return None

    def _entered(self, rank: int, phase: str) -> None:
        self._phases[rank] = phase
        if phase != self._told and all(other == phase for other in self._phases):
            self._told = phase
            self._tell(phase)

    def _death(self, rank: int) -> RankDied:
        """Return the error for a rank that ended, and kill the others."""
        self._agent.join(_SEEN)
        death = ended(self._names[rank], self._agent.failures.get(rank), self._phases[rank], self._log(rank))
        self.kill()
        return death

    def _agent_ended(self, rank: int) -> RankDied:
        """Return the error if the agent has ended before any channel closed: not all ranks have started."""
        if self._agent.failures:
            return self._death(next(iter(self._agent.failures)))
        error = self._agent.error
        info = ErrorInfo(
            message=f"torch elastic started no ranks: {error or 'it ended without an error message'}",
            type_name=f"{type(error).__module__}.{type(error).__qualname__}" if error is not None else "",
            phase=self._phases[rank],
        )
        return RankDied(info, outcome=results.FAILED)

    def _raised(self, found: dict[int, Message]) -> RankDied:
        """Return the ranks' exceptions as one error: the first rank's that raised, and which ranks raised it too.

        Raises MachineError if the exception was one.
        """
        errors = [rank for rank in sorted(found) if found[rank]["kind"] == "error"]
        reply = found[errors[0]]
        info = ErrorInfo(**reply["error"])
        who = f"rank {self._names[errors[0]]}" if len(errors) < self._count else "every rank"
        info.message = f"{who}: {info.message}" if info.message else who
        info.log = "\n".join(tail(self._names[rank], self._log(rank)) for rank in errors)
        self.kill()
        if reply["outcome"] in MACHINE_ERRORS:
            raise MACHINE_ERRORS[reply["outcome"]](info.message)
        return RankDied(info, outcome=reply["outcome"])

    def _out_of_step(self, found: dict[int, Message]) -> RankDied:
        """Return the error for a rank that raised while other ranks wait for it."""
        silent = [str(self._names[rank]) for rank in range(self._count) if rank not in found]
        death = self._raised(found)
        death.info.message += f" (rank {', '.join(silent)} still waited for it after {_GRACE:g} s, killed)"
        return death

    def _log(self, rank: int) -> Path:
        return log_of(self._logs, rank)

    def close(self) -> None:
        """Do nothing: ranks end by themselves once their channels close, which this process's end does."""

    def kill(self) -> None:
        """Kill all ranks that are left. Do not wait for them: torch elastic's thread does that."""
        for descriptor in self._processes.values():
            _send(descriptor, signal.SIGKILL)
        self._agent.join(_SEEN)

    def _dump(self, *_: Any) -> None:
        """Print where each rank is, on SIGUSR1, which the pytest process sends before it kills a load that hangs."""
        before = {rank: self._size(rank) for rank in self._processes}
        for descriptor in self._processes.values():
            _send(descriptor, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and any(self._size(rank) == before[rank] for rank in before):
            select.select([], [], [], 0.02)
        lines = [
            f"rank {self._names[rank]} is in phase '{self._phases[rank]}'\n{self._stack(rank, before[rank])}"
            for rank in before
        ]
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()

    def _size(self, rank: int) -> int:
        log = self._log(rank)
        return log.stat().st_size if log.exists() else 0

    def _stack(self, rank: int, begin: int) -> str:
        """Return the stack of its main thread that a rank wrote, innermost call first."""
        text = last_lines(self._log(rank), _STACKS, begin)
        own = text[text.rfind("Current thread") :] if "Current thread" in text else text
        return "\n".join(own.splitlines()[:_STACK_LINES])


def _send(process: int, number: int) -> None:
    # The channel of a rank that has ended already reports it.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, number)
