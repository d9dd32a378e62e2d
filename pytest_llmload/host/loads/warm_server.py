"""The pytest process's side of the warm server, which imports once and forks a process for each load."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytest_llmload.core.errors import MachineError
from pytest_llmload.system.logs import last_lines
from pytest_llmload.system.process_exit import how
from pytest_llmload.system.protocol import Channel, Closed, Message

#: Seconds a server gets for its imports.
_WARM_UP = 300.0
#: Seconds the server gets to end, before it is killed.
_GRACE = 2.0
#: Number of lines, from the end, of what a process printed.
LOG_LINES = 30
#: The folder that holds this package is put last on the path, and the current folder taken off it: a user's
#: ``types.py`` must not become the standard library's.
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv[1]); "
    "from pytest_llmload.process.server import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


def variables(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a server and its loads: the user's, with settings that keep it forkable."""
    return {
        # OpenBLAS starts its threads when numpy is imported; a server with threads must not fork.
        "OPENBLAS_NUM_THREADS": "1",
        **base,
    }


class Forked(NamedTuple):
    """A process that a server has forked."""

    channel: Channel
    pid: int


class WarmServer:
    """A process that imports once and forks a process per load. It must be started from the main thread."""

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

    def fork(self, log: Path) -> Forked | str:
        """Return a new process, which prints to ``log``; or, as text, why the server may not fork any more.

        Raises MachineError as :meth:`wait` does.
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
        return Forked(Channel(ours), reply["pid"])

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
        return last_lines(self._log, LOG_LINES)

    def _failure(self, what: str, error: Closed | TimeoutError) -> MachineError:
        status = self.exit_status
        late = f"did not answer for {_WARM_UP:g} s"
        end = (
            late if isinstance(error, TimeoutError) else "died" if status is None else f"died ({end_in_words(status)})"
        )
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


def end_in_words(status: int) -> str:
    """Return an exit status, minus the signal's number, in words."""
    return how(status).removeprefix("was ")
