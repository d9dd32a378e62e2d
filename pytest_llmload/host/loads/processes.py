"""The processes that load: a warm server that forks one per load, and the reasons for which each one ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.core import results
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.portable import bounded, scrub
from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.progress import Watch
from pytest_llmload.system.logs import LINE, last_lines
from pytest_llmload.system.process_exit import how
from pytest_llmload.system.protocol import Channel, Closed, Garbled, Message

#: Seconds a process gets to write its stacks, and then to end, before it is killed.
_GRACE = 2.0
#: Seconds for the kernel to clean up killed processes, whose GPUs the next load gets.
_DYING = 30.0
#: Seconds a server gets for its imports.
_WARM_UP = 300.0
_LOG_LINES = 30
#: Number of lines, from the end, of the stacks of a load that hangs; the main thread's comes last.
_STACK_LINES = 40
#: Lines of a remote traceback that are kept, from its end, and characters of any other text.
_TRACEBACK_LINES = 200
_TEXT = 4096
_OOM = ": the kernel's out-of-memory killer was at work"
#: The folder that holds this package is put last on the path, and the current folder taken off it: a user's
#: ``types.py`` must not become the standard library's.
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv[1]); "
    "from pytest_llmload.process.server import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a server and its loads: the user's, with settings that keep it forkable."""
    return {
        # OpenBLAS starts its threads when numpy is imported; a server with threads must not fork.
        "OPENBLAS_NUM_THREADS": "1",
        **base,
    }


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

    def __init__(self, channel: Channel, pid: int, log: Path, server: Server, *, owned: bool) -> None:
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
                    raise self._part_died(_fit(reply))
                if reply["kind"] != "phase":
                    return _fit(reply)
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
        parts = [last_lines(log, _LOG_LINES) for log in (self._log, *self.printed)]
        return "\n".join(part for part in parts if part)

    def hang_up(self) -> None:
        """Have the process end by itself, without waiting for it; :meth:`close` waits."""
        self._channel.close()

    def close(self) -> None:
        """Let the process end by itself; kill it if it does not."""
        if not self.alive:
            return
        self._channel.close()
        if self._server.status(self._pid, _GRACE) is None:
            self._kill_group()
        self._ended()

    def kill(self) -> None:
        if self.alive:
            self._kill_group()
            self._channel.close()
            self._ended()

    def _kill_group(self) -> None:
        # The process leads its own session: every process that it started ends with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
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
        return LoadDied(results.CRASHED, ErrorInfo(message=_fit_texts(message), log=self.tail(), phase=self.phase))

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
            message = f"{_how(status)} {where}"
        else:
            self._kill_group()
            message = f"hung up {where} without ending, killed"
            status = self._server.exit_status
            if server_died := status is not None:
                message = f"the process that loads are forked from died ({_how(status)}), and the load with it {where}"
        if status == -signal.SIGKILL and hardware.oom_kills() > self._oom_kills:
            outcome = results.OUT_OF_MEMORY
            message += _OOM
        self._ended()
        if server_died and outcome != results.OUT_OF_MEMORY:
            # The model did not cause that.
            return MachineError(f"{message}:\n{self._server.tail()}")
        return LoadDied(outcome, ErrorInfo(message=message, log=self.tail(), phase=self.phase))


class Server:
    """A warm server: it imports once and forks a process per load. It must be started from the main thread."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        ours, theirs = _pair()
        self._log = log
        self._channel = Channel(ours)
        self._closed = False
        #: Imports that were requested and that it has not answered yet, request by request.
        self._importing: list[Sequence[str]] = []
        self._ended: dict[int, int] = {}
        self._gone: set[int] = set()
        root = str(Path(__file__).resolve().parents[3])
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, root, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=env,
                # Not in our process group: Ctrl-C is ours to handle.
                start_new_session=True,
            )
        theirs.close()

    def warm_up(self, modules: Sequence[str], cuda: dict[str, Any] | None) -> None:
        """Have the server import the modules, as far as they are installed; :meth:`fork` waits for it."""
        self._importing.append(modules)
        # If the server died of an earlier request, the wait reports it.
        with contextlib.suppress(Closed):
            self._channel.send({"kind": "import", "modules": list(modules), "cuda": cuda})

    def wait(self) -> None:
        """Wait until all is imported. Raises MachineError if that fails; then the server cannot be used any more."""
        try:
            while self._importing:
                self._next(lambda message: message["kind"] == "ready", _WARM_UP)
                del self._importing[0]
        except (Closed, TimeoutError) as error:
            raise self._failure(f"imports {', '.join(self._importing[0][:3])} … for all loads", error) from None

    def fork(self, log: Path, *, owned: bool = False) -> LoadProcess | str:
        """Return a new load process; or, as text, why the server may not fork any more.

        If ``owned``, the server serves this one process and ends with it. Raises MachineError as :meth:`wait` does.
        """
        self.wait()
        ours, theirs = _pair()
        with theirs:
            try:
                self._channel.send({"kind": "fork", "log": str(log)}, fds=(theirs.fileno(),))
                reply = self._next(lambda message: message["kind"] in ("forked", "refused"), _WARM_UP)
            except (Closed, TimeoutError) as error:
                ours.close()
                raise self._failure("loads are forked from", error) from None
            except BaseException:
                # Interrupted: the answer would be taken for that to the next request.
                ours.close()
                self.close()
                raise
        if reply["kind"] == "refused":
            ours.close()
            return str(reply["reason"])
        return LoadProcess(Channel(ours), reply["pid"], log, self, owned=owned)

    def status(self, pid: int, seconds: float) -> int | None:
        """Return how a forked process ended (minus the signal's number, as in subprocess); None if it runs."""
        if pid not in self._ended:
            try:
                self._next(lambda message: message["kind"] == "exited" and message["pid"] == pid, seconds)
            except (TimeoutError, Closed):
                return None
        return self._ended[pid]

    def gone(self, pid: int, seconds: float) -> None:
        """Wait until an ended process and every process that it had started are gone; then forget its process id.

        The kernel may give the id to a different process.
        """
        if pid not in self._gone:
            # The lease of the next load names a process that still does not end by then.
            with contextlib.suppress(TimeoutError, Closed):
                self._next(lambda message: message["kind"] == "gone" and message["pid"] == pid, seconds)
        self._gone.discard(pid)
        self._ended.pop(pid, None)

    @property
    def exit_status(self) -> int | None:
        """Return the exit status of the server itself (minus the signal's number); None while it serves."""
        return self._process.poll()

    def tail(self) -> str:
        """Return the last lines that the server printed."""
        return last_lines(self._log, _LOG_LINES)

    def _failure(self, what: str, error: Closed | TimeoutError) -> MachineError:
        status = self.exit_status
        late = f"did not answer for {_WARM_UP:g} s"
        end = late if isinstance(error, TimeoutError) else "died" if status is None else f"died ({_how(status)})"
        return MachineError(f"the process that {what} {end}:\n{self.tail()}")

    def _next(self, wanted: Callable[[Message], bool], seconds: float) -> Message:
        deadline = time.monotonic() + seconds
        while True:
            if self._closed:
                raise Closed
            try:
                message, _ = self._channel.receive(timeout=max(deadline - time.monotonic(), 0.0))
            except Closed:
                # Its files are closed a moment before its status can be asked for.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
                raise
            if message["kind"] == "exited":
                self._ended[message["pid"]] = message["status"]
            elif message["kind"] == "gone":
                self._gone.add(message["pid"])
            if wanted(message):
                return message

    def close(self) -> None:
        """End the server, which ends whatever it still has forked."""
        self._closed = True
        self._channel.close()
        if self._importing:
            # It would notice the end only after the imports, and it has not forked yet.
            self._process.kill()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _pair() -> tuple[socket.socket, socket.socket]:
    """Return two sockets that are connected. Raises MachineError if a different plugin forbids it."""
    try:
        return socket.socketpair()
    except RuntimeError as error:
        raise MachineError(
            f"no connection to a load's process can be made: {error} (with pytest-socket, give --allow-unix-socket, "
            "which still allows no network)"
        ) from None


def start_cold(log: Path, env: dict[str, str]) -> LoadProcess:
    """Return a load process with its own server without imports, for loads whose environment differs."""
    server = Server(log.with_suffix(".server.log"), env)
    try:
        process = server.fork(log, owned=True)
    except BaseException:
        server.close()
        raise
    assert isinstance(process, LoadProcess), "a server that imported nothing may fork"
    return process


def _fit(reply: Message) -> Message:
    """Return a reply whose texts are bounded, printable and without secrets, for any error or log of the load."""
    fit = dict(reply)
    if "error" in reply:
        lines = {name: reply["error"][name].splitlines()[-_TRACEBACK_LINES:] for name in ("traceback", "log")}
        texts = {name: "\n".join(bounded(scrub(line), LINE) for line in lines[name]) for name in lines}
        fit["error"] = {**_fit_texts(reply["error"]), **texts}
    if "result" in reply:
        fit["result"] = {**_fit_texts(reply["result"]), "spec": reply["result"]["spec"]}
    return fit


def _fit_texts(value: Any) -> Any:
    if isinstance(value, str):
        return bounded(scrub(value), _TEXT)
    if isinstance(value, dict):
        return {scrub(key): _fit_texts(item) for key, item in value.items()}
    return [_fit_texts(item) for item in value] if isinstance(value, list) else value


def _how(status: int) -> str:
    """Return an exit status, minus the signal's number, in words."""
    return how(status).removeprefix("was ")
