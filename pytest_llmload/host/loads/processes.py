"""The process of a load as the pytest process sees it: requests, replies, and the reasons for which it ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.core import results
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.progress import Watch
from pytest_llmload.host.loads.replies import fit, fit_texts
from pytest_llmload.host.loads.warm_server import LOG_LINES, WarmServer, end_in_words
from pytest_llmload.system.logs import last_lines
from pytest_llmload.system.protocol import Channel, Closed, Garbled, Message

#: Seconds a process gets to write its stacks, and then to end, before it is killed.
_GRACE = 2.0
#: Seconds for the kernel to clean up killed processes, whose GPUs the next load gets.
_DYING = 30.0
#: Number of lines, from the end, of the stacks of a load that hangs; the main thread's comes last.
_STACK_LINES = 40
_OOM = ": the kernel's out-of-memory killer was at work"


class LoadDied(Exception):
    """The load's process is gone; ``outcome`` and ``info`` say how."""

    def __init__(self, outcome: str, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.outcome = outcome
        self.info = info


class Interrupted(Exception):
    """A test was ended while a load's process worked for it, as by pytest-timeout; ``info`` has phase and log."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


class LoadProcess:
    """One load process, forked by a server, and the channel to it."""

    def __init__(self, channel: Channel, pid: int, log: Path, server: WarmServer, *, owned: bool) -> None:
        self._channel = channel
        self._pid = pid
        self._log = log
        self._server = server
        self._owned = owned
        self._oom_kills = hardware.oom_kills()
        self.phase = "start"
        self.alive = True
        #: File descriptors that came with replies; the code that uses one takes it out.
        self.received: list[int] = []

    @property
    def pid(self) -> int:
        """Return the process id."""
        return self._pid

    def request(
        self,
        message: Message,
        timeout: float,
        entered: Callable[[str], None] | None = None,
        watch: Watch | None = None,
    ) -> Message:
        """Send a request and wait for its reply, ``timeout`` seconds at most.

        ``entered`` is called with each phase that the process enters, and ``watch`` follows it meanwhile. Raises
        LoadDied, or MachineError if the server died; then the process is gone.
        """
        try:
            self.send(message)
            return self.reply(timeout, entered, watch)
        except pytest.fail.Exception as error:
            self._abandon()
            where = f"in phase '{self.phase}'"
            info = ErrorInfo(message=f"killed {where}: {error}", log=self.tail(), phase=self.phase)
            raise Interrupted(info) from None

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send a request without waiting for its reply; :meth:`reply` reports a process that is gone."""
        with contextlib.suppress(Closed):
            self._channel.send(message, descriptors)

    def reply(
        self, timeout: float, entered: Callable[[str], None] | None = None, watch: Watch | None = None
    ) -> Message:
        """Wait for the reply to a request that was sent, and return it as :meth:`request` does."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                reply, descriptors = self._receive(deadline, watch)
                self.received += descriptors
                if reply["kind"] == "died":
                    raise self._part_died(fit(reply))
                if reply["kind"] != "phase":
                    return fit(reply)
                self.phase = reply["phase"]
                if watch is not None:
                    watch.entered(reply)
                if entered is not None:
                    entered(self.phase)
        except Garbled as error:
            raise self._spoilt(error) from None
        except Closed:
            raise self._death() from None
        except TimeoutError:
            raise self._timed_out(timeout) from None
        except LoadDied:
            raise
        except BaseException:
            # Ctrl-C, pytest-timeout: the reply would be read by the wrong request.
            self._abandon()
            raise

    def _receive(self, deadline: float, watch: Watch | None) -> tuple[Message, list[int]]:
        """Return the next message, and have ``watch`` follow the process until it comes. Raises TimeoutError."""
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            interval = watch.interval if watch is not None and watch.interval else left
            try:
                return self._channel.receive(timeout=min(left, interval))
            except TimeoutError:
                if watch is None or left <= interval:
                    raise
                watch.look()

    @property
    def printed(self) -> tuple[Path, Path]:
        """Return the files that a test's function prints to, in place of stdout and stderr."""
        return Path(f"{self._log}.stdout"), Path(f"{self._log}.stderr")

    def _abandon(self) -> None:
        """Kill the process, after reading which phase it has reached."""
        if not self.alive:
            return
        with contextlib.suppress(Closed, TimeoutError):
            while True:
                message, _ = self._channel.receive(timeout=0.0)
                self.phase = message.get("phase", self.phase)
        self.kill()

    def tail(self) -> str:
        """Return the last lines that the process printed."""
        parts = [last_lines(log, LOG_LINES) for log in (self._log, *self.printed)]
        return "\n".join(part for part in parts if part)

    def hang_up(self) -> None:
        """Have the process end by itself, without waiting for it; :meth:`close` waits."""
        self._channel.close()

    def close(self) -> None:
        """Let the process end by itself; kill it if it does not."""
        if not self.alive:
            return
        try:
            self._channel.close()
            if self._server.status(self._pid, _GRACE) is None:
                self._kill_group()
            self._ended()
        except BaseException:
            # Ctrl-C, pytest-timeout: it may not outlive the lease of its GPUs.
            self.kill()
            raise

    def kill(self) -> None:
        """Kill the process and every process that it started, and wait until they are gone."""
        if self.alive:
            self._kill_group()
            self._channel.close()
            self._ended()

    def _kill_group(self) -> None:
        # The process leads its own session: every process that it started ends with it.
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self._pid, signal.SIGKILL)
            except ProcessLookupError:
                if self._server.exit_status is None and self._server.status(self._pid, 0.0) is None:
                    # It has just been forked, and does not lead a session yet.
                    os.kill(self._pid, signal.SIGKILL)
        self._server.status(self._pid, _GRACE)

    def _ended(self) -> None:
        self.alive = False
        self._server.gone(self._pid, _DYING)
        if self._owned:
            self._server.close()

    def _timed_out(self, timeout: float) -> LoadDied:
        before = self._log.stat().st_size if self._log.exists() else 0
        said = self.tail()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)  # faulthandler writes every thread's stack
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and self._log.stat().st_size == before:
            select.select([], [], [], 0.02)
        # However many threads there are, the last output of the load itself stands before their stacks.
        log = "\n".join(part for part in (said, last_lines(self._log, _STACK_LINES, before)) if part)
        info = ErrorInfo(
            message=f"still in phase '{self.phase}' after {timeout:g} s, killed", log=log, phase=self.phase
        )
        self.kill()
        return LoadDied(results.TIMEOUT, info)

    def _spoilt(self, error: Garbled) -> LoadDied:
        """Return the end of a load whose own code wrote to the channel, so that its replies cannot be read any more."""
        self.kill()
        message = f"wrote to the connection between it and pytest in phase '{self.phase}', killed: {error}"
        return LoadDied(results.CRASHED, ErrorInfo(message=fit_texts(message), log=self.tail(), phase=self.phase))

    def _part_died(self, reply: Message) -> LoadDied:
        """Kill a load of several processes, one of which is gone, and return the error that says so."""
        outcome, info = reply["outcome"], ErrorInfo(**reply["error"])
        if reply["signal"] == signal.SIGKILL and hardware.oom_kills() > self._oom_kills:
            outcome = results.OUT_OF_MEMORY
            info.message += _OOM
        self.kill()
        return LoadDied(outcome, info)

    def _death(self) -> LoadDied | MachineError:
        self._channel.close()
        status = self._server.status(self._pid, _GRACE)
        where = f"in phase '{self.phase}'"
        outcome = results.CRASHED
        server_died = False
        if status is not None:
            message = f"{end_in_words(status)} {where}"
        else:
            self._kill_group()
            message = f"hung up {where} without ending, killed"
            status = self._server.exit_status
            if server_died := status is not None:
                died = f"the process that loads are forked from died ({end_in_words(status)})"
                message = f"{died}, and the load with it {where}"
        if status == -signal.SIGKILL and hardware.oom_kills() > self._oom_kills:
            outcome = results.OUT_OF_MEMORY
            message += _OOM
        self._ended()
        if server_died and outcome != results.OUT_OF_MEMORY:
            # The model did not cause that.
            return MachineError(f"{message}:\n{self._server.tail()}")
        return LoadDied(outcome, ErrorInfo(message=message, log=self.tail(), phase=self.phase))


def fork(server: WarmServer, log: Path, *, owned: bool = False) -> LoadProcess | str:
    """Return a new load process; or, as text, why the server may not fork any more.

    If ``owned``, the server serves this one process and ends with it. Raises MachineError as
    :meth:`WarmServer.wait` does.
    """
    forked = server.fork(log)
    if isinstance(forked, str):
        return forked
    return LoadProcess(forked.channel, forked.pid, log, server, owned=owned)


def start_cold(log: Path, env: dict[str, str]) -> LoadProcess:
    """Return a load process with its own server without imports, for loads whose environment differs."""
    server = WarmServer(log.with_suffix(".server.log"), env)
    try:
        process = fork(server, log, owned=True)
    except BaseException:
        server.close()
        raise
    assert isinstance(process, LoadProcess), "a server that imported nothing may fork"
    return process
