"""A server's process: started on a free port, watched until it is healthy, stopped at the end."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pytest_llmload.core import results
from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.system.logs import last_lines
from pytest_llmload.system.process_exit import Died, how

HOST = "127.0.0.1"
_BOOT = Path(__file__).with_name("boot.py")
#: Seconds between two health checks of a server; its end is noticed at once.
_LOOK = 0.05
#: Seconds in which a server must end by itself; the process that owns this one does not wait much longer.
_GRACE = 1.5
_LINES = 20
_ALL_LINES = 5000


def free_port() -> int:
    """Return a loopback port that no process listens on."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


class ServerProcess:
    """One server, which ends with this process. Start it from the main thread: Linux ties its end to that thread's."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                # Isolated and without site-packages: the script only sets a flag, and becomes the server.
                [sys.executable, "-I", "-S", str(_BOOT), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        self.pid = self._process.pid
        self._descriptor = os.pidfd_open(self.pid)

    @property
    def tail(self) -> str:
        """Return the last lines that the server printed."""
        return last_lines(self.log, _LINES)

    @property
    def output(self) -> str:
        """Return the server's output so far; of a very long one, its end."""
        return last_lines(self.log, _ALL_LINES)

    def wait_until(self, healthy: Callable[[], str], deadline: float, is_open: Callable[[], bool]) -> None:
        """Wait until ``healthy`` returns an empty reason. Raises Died if the server ends or the deadline passes."""
        begin = time.monotonic()
        while complaint := healthy():
            if time.monotonic() > deadline:
                port = "its port is open" if is_open() else "no process listens on its port"
                message = f"the server was not healthy after {round(deadline - begin, 1):g} s: {complaint}; {port}"
                raise Died(ErrorInfo(message=message, log=self.tail, phase="start"), outcome=results.TIMEOUT)
            self.check("before it was healthy", _LOOK)

    def check(self, when: str, seconds: float = 0.0, *, with_its_end: bool = True) -> None:
        """Raise Died if the server has ended, or ends within ``seconds``.

        The error has the last lines of the server's log, or those of this moment if ``with_its_end`` is false.
        """
        now = "" if with_its_end else self.tail
        select.select([self._descriptor], [], [], seconds)
        status = self._process.poll()
        if status is not None:
            message = f"the server {how(status)} {when}"
            log = self.tail if with_its_end else now
            raise Died(ErrorInfo(message=message, log=log, phase="start"), max(0, -status))

    def stop(self) -> None:
        """End the server; its own child processes end with the session that this process leads."""
        if self._process.poll() is None:
            self._process.terminate()
            select.select([self._descriptor], [], [], _GRACE)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def transformers_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of ``transformers serve`` by this interpreter, without the current folder on its path."""
    program = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; "
        "from transformers.cli.transformers import main; sys.exit(main())"
    )
    return [sys.executable, "-c", program, "serve", *arguments]
