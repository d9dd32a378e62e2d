"""Messages between the pytest process and its load processes: JSON with a length in front, over a socket."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

Message = dict[str, Any]
_HEADER = struct.Struct("!Q")


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """One end of a stream socket that carries messages in both directions."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message and, with it, open file descriptors. Raises Closed."""
        body = json.dumps(message).encode()
        try:
            if fds:
                socket.send_fds(self.socket, [_HEADER.pack(len(body))], list(fds))
            else:
                self.socket.sendall(_HEADER.pack(len(body)))
            self.socket.sendall(body)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, timeout: float | None = None, max_fds: int = 0) -> tuple[Message, tuple[int, ...]]:
        """The next message and the file descriptors sent with it. Raises Closed, or TimeoutError after seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        header, fds = self._read(_HEADER.size, deadline, max_fds)
        body, _ = self._read(_HEADER.unpack(header)[0], deadline, 0)
        return json.loads(body), fds

    def _read(self, size: int, deadline: float | None, max_fds: int) -> tuple[bytes, tuple[int, ...]]:
        chunks = bytearray()
        received: tuple[int, ...] = ()
        while len(chunks) < size:
            if deadline is not None:
                self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            else:
                self.socket.settimeout(None)
            try:
                if max_fds and not received:
                    chunk, fds, _, _ = socket.recv_fds(self.socket, size - len(chunks), max_fds)
                    received = tuple(fds)
                else:
                    chunk = self.socket.recv(size - len(chunks))
            except ConnectionResetError as error:
                raise Closed from error
            if not chunk:
                raise Closed
            chunks += chunk
        return bytes(chunks), received

    def close(self) -> None:
        self.socket.close()
