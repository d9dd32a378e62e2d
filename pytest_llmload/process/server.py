"""The warm server: imports once, forks a process for each load, and reports how each one ended.

It does not use ``multiprocessing.forkserver``: a load needs a log, a session and a channel of its own, and the server
waits for its exit status and for those of its orphans.

The main thread of the pytest process starts the server with exec, and gives it one end of a socket pair. The server
never loads a model itself, and refuses to fork once a fork would not be safe.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Collection
from typing import Any, NoReturn

from pytest_llmload.core.units import counted
from pytest_llmload.process import load_process, server_imports
from pytest_llmload.system import garbage, process
from pytest_llmload.system.process_tree import descendants
from pytest_llmload.system.protocol import Channel, Closed, Message


class Server:
    """One warm process: it answers ``import`` and ``fork``, and reports ``exited`` and ``gone``, on one channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel.socket, selectors.EVENT_READ)
        self._children: dict[int, int] = {}
        self._threads = process.thread_count()
        #: Helper processes that an imported module has started, which must stay alive.
        self._helpers: Collection[int] = ()

    def run(self) -> NoReturn:
        """Serve until the pytest process closes the channel or ends."""
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._channel.socket:
                        self._obey()
                    else:
                        self._reap(key.data)
        except Closed:
            self.end()

    def _obey(self) -> None:
        """Carry out all received requests; those that arrived together do not show on the socket again."""
        more = True
        while more:
            message, fds = self._channel.receive()
            if message["kind"] == "import":
                self._import(message)
            else:
                self._fork(message, fds[0])
            more = self._channel.has_message

    def end(self, *_: object) -> NoReturn:
        """End at once, with every forked process and its descendants."""
        process.end_descendants()
        os._exit(0)

    def _import(self, message: Message) -> None:
        server_imports.import_all(message["modules"], message["cuda"])
        garbage.freeze()
        self._threads = process.thread_count()
        self._helpers = descendants(os.getpid(), keep=self._children)
        self._channel.send({"kind": "ready"})

    def _unsafe(self) -> str | None:
        if process.thread_count() > self._threads:
            return f"it runs {counted(process.thread_count(), 'thread')}, {self._threads} after its imports"
        if files := process.open_gpu_files():
            return f"it holds {files[0]}: a module that it imported has touched the GPU"
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return "CUDA is initialised in it"
        return None

    def _fork(self, message: Message, fd: int) -> None:
        if reason := self._unsafe():
            os.close(fd)
            self._channel.send({"kind": "refused", "reason": reason})
            return
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(server, fd, message)
        os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._children[pid] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, data=pid)
        self._channel.send({"kind": "forked", "pid": pid})

    def _become_child(self, server: int, fd: int, message: Message) -> None:
        status = 70
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            process.die_with_parent(server, signal.SIGKILL)
            self._selector.close()
            self._channel.close()
            for pidfd in self._children.values():
                os.close(pidfd)
            status = load_process.main(fd, message["log"])
        except BaseException:
            # Printed into the process's log, whose last lines are reported when it has ended.
            traceback.print_exc()
            raise
        finally:
            # Neither the server's exit handlers nor its loop may run in the child.
            os._exit(status)

    def _reap(self, pid: int) -> None:
        pidfd = self._children.pop(pid)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._channel.send({"kind": "exited", "pid": pid, "status": os.waitstatus_to_exitcode(status)})
        # The server adopts what a load leaves behind. Orphans in the session of a load that still runs, or that is
        # prepared, are that load's: the process that samples its memory, for one.
        process.end_descendants(keep={*self._children, *self._helpers}, sessions=self._children)
        self._channel.send({"kind": "gone", "pid": pid})


def main(fd: int, parent: int) -> None:
    """Serve the pytest process ``parent`` over the socket ``fd`` until it closes the socket or ends."""
    server = Server(Channel(socket.socket(fileno=fd)))
    # Ctrl-C goes to the whole foreground group; the pytest process decides when its loads end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, server.end)
    process.die_with_parent(parent, signal.SIGTERM)
    process.adopt_orphans()
    server.run()
