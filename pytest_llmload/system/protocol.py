"""Exchange messages between the pytest process and its load processes: JSON after its length, over a socket."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import time
from typing import Any

from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.system.json_text import Unreadable, parse, short

Message = dict[str, Any]
_HEADER = struct.Struct("!Q")
#: File descriptors that one message may carry: a lock for each GPU of a machine.
_DESCRIPTORS = 32


#: Kind of a message -> the entries that it must have; it may have more. The pytest process's requests come first, then
#: the answers of a server, then those of a load.
KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "import": {"modules": list},
    "fork": {"log": str},
    "resolve": {"spec": str, "cache_dir": str, "trust_remote_code": bool},
    "adapter": {},
    "plan": {},
    "load": {"job": dict},
    "generate": {"max_new_tokens": int},
    "run": {},
    "ready": {},
    "claim": {},
    "claimed": {},
    "refused": {"reason": str},
    "forked": {"pid": int},
    "exited": {"pid": int, "status": int},
    "gone": {"pid": int},
    "hello": {"pid": int, "rank": int},
    "phase": {"phase": str},
    "died": {"outcome": str, "error": dict, "signal": int},
    "error": {"outcome": str, "error": dict},
    "result": {"result": dict},
    "checkpoint": {"checkpoint": dict},
    "value": {},
}
#: Largest size in bytes of a message: a value that ``llm.run`` returns may have some hundred MiB.
LARGEST = 1 << 30


class Closed(Exception):
    """The process at the other end has closed the connection or died."""


class Garbled(Closed):
    """Data that is not a message arrived, so nothing after it can be read either; or this side's socket was closed."""


class Channel:
    """One end of a stream socket that carries messages in both directions."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        # Keeps the bytes that have arrived when a wait times out in the middle of a message.
        self._buffer = bytearray()
        self._fds: list[int] = []

    def send(self, message: Message, fds: tuple[int, ...] = ()) -> None:
        """Send one message and, with it, open file descriptors. Raises Closed."""
        body = json.dumps(message).encode()
        data = _HEADER.pack(len(body)) + body
        try:
            self.socket.settimeout(None)
            sent = socket.send_fds(self.socket, [data], list(fds)) if fds else 0
            self.socket.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error
        except OSError as error:
            raise Garbled(f"the connection cannot be used any more: {error.strerror or error}") from error

    @property
    def has_message(self) -> bool:
        """Return whether a whole message has already arrived with an earlier one and waits in the buffer."""
        size = len(self._buffer)
        return size >= _HEADER.size and size >= _HEADER.size + int(_HEADER.unpack_from(self._buffer)[0])

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]]:
        """Return the next message and the file descriptors sent with it.

        Raises Closed, and TimeoutError after ``timeout`` seconds; None waits without a limit.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self._fill(_HEADER.size, deadline)
        size = _HEADER.unpack_from(self._buffer)[0]
        if size > LARGEST:
            raise Garbled(f"a message of {size} bytes was announced, but none has more than {LARGEST}")
        end = _HEADER.size + size
        self._fill(end, deadline)
        message = read_message(bytes(self._buffer[_HEADER.size : end]))
        del self._buffer[:end]
        fds, self._fds = self._fds, []
        return message, fds

    def _fill(self, size: int, deadline: float | None) -> None:
        while len(self._buffer) < size:
            try:
                # A timeout of zero would mean "do not block" and raise a different error.
                self.socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
                chunk, fds, _, _ = socket.recv_fds(self.socket, max(size - len(self._buffer), 1 << 16), _DESCRIPTORS)
            except ConnectionResetError as error:
                raise Closed from error
            except TimeoutError:
                raise
            except OSError as error:
                raise Garbled(f"the connection cannot be used any more: {error.strerror or error}") from error
            if not chunk:
                raise Closed
            self._buffer += chunk
            self._fds += fds

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def read_message(body: bytes) -> Message:
    """Return the message in a frame. Raises Garbled unless it is one of :data:`KINDS` with its entries."""
    try:
        message = parse(body, halves=True)
    except Unreadable as error:
        raise Garbled(f"what arrived {error}") from None
    kind = message.get("kind") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise Garbled(f"{short(message)} arrived, which is not a message")
    for name, expected in KINDS[kind].items():
        if not isinstance(message.get(name), expected):
            raise Garbled(f"a message {kind!r} arrived with {short(message.get(name))} as its {name!r}")
    if "error" in KINDS[kind]:
        _check_error(kind, message["error"])
    return dict(message)


def _check_error(kind: str, error: dict[str, Any]) -> None:
    if set(error) - _ERROR or not isinstance(error.get("message"), str) or not all(map(_is_text, error.values())):
        raise Garbled(f"a message {kind!r} arrived whose error cannot be read: {short(error)}")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


#: The entries of an error, as :class:`ErrorInfo` has them.
_ERROR = {field.name for field in dataclasses.fields(ErrorInfo)}
