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
        # What has arrived stays here when a wait times out in the middle of a message.
        self._buffer = bytearray()
        self._fds: list[int] = []

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message and, with it, open file descriptors. Raises Closed."""
        body = json.dumps(message).encode()
        data = _HEADER.pack(len(body)) + body
        self.socket.settimeout(None)
        try:
            sent = socket.send_fds(self.socket, [data], list(fds)) if fds else 0
            self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    @property
    def has_message(self) -> bool:
        """Whether a whole message has arrived with an earlier one, so that nothing more need come on the socket."""
        size = len(self._buffer)
        return size >= _HEADER.size and size >= _HEADER.size + int(_HEADER.unpack_from(self._buffer)[0])

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]]:
        """The next message and the file descriptors sent with it. Raises Closed, or TimeoutError after seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._fill(_HEADER.size, deadline)
        end = _HEADER.size + _HEADER.unpack_from(self._buffer)[0]
        self._fill(end, deadline)
        message = json.loads(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        fds, self._fds = self._fds, []
        return message, fds

    def _fill(self, size: int, deadline: float | None) -> None:
        while len(self._buffer) < size:
            # A timeout of zero would mean "do not block" and raise another error.
            self.socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
            try:
                chunk, fds, _, _ = socket.recv_fds(self.socket, max(size - len(self._buffer), 1 << 16), 4)
            except ConnectionResetError as error:
                raise Closed from error
            if not chunk:
                raise Closed
            self._buffer += chunk
            self._fds += fds

    def close(self) -> None:
        self.socket.close()
