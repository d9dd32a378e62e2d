"""The client's end of HTTP: one connection a request, one deadline for all of them, server-sent events."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pytest_llmload.core.portable import HIDDEN, scrub

#: Characters of a body that is quoted in a message.
_QUOTED = 300
#: No line of a stream of tokens is longer; a body without line ends is no stream.
_LINE = 1 << 20


class Unreachable(Exception):
    """Nobody answers at the address."""


class HungUp(Exception):
    """The connection ended before the answer did."""


class Late(Exception):
    """No answer within the deadline."""


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    body: str

    def json(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def quoted(self) -> str:
        """The body in one line, cut."""
        text = " ".join(self.body.split())
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]} …"


class Endpoint:
    """Where a server answers."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = urllib.parse.urlsplit(url)
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port
        # As clients of OpenAI's API are given it; the paths asked for begin with it.
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key = key
        #: A moment of ``time.monotonic`` after which nothing is waited for.
        self.deadline = time.monotonic() + 60

    def get(self, path: str, within: float | None = None) -> Reply:
        """``within``: seconds to wait, whatever the deadline. Raises Unreachable, HungUp and Late."""
        return self._request("GET", path, within=within)

    def post(self, path: str, body: object) -> Reply:
        """Raises Unreachable, HungUp and Late."""
        return self._request("POST", path, body)

    def is_open(self) -> bool:
        """Whether anybody listens on the port."""
        try:
            socket.create_connection((self._host, self._port or (443 if self._secure else 80)), timeout=1).close()
        except OSError:
            return False
        return True

    def events(self, path: str, body: object) -> Iterator[tuple[float, str] | Reply]:
        """The data of each event of a stream, with the moment it came (``time.perf_counter``).

        A single Reply where the answer is none. Raises Unreachable, HungUp and Late; the end of the connection is the
        end of the iterator: whether it was the end of the answer, only the protocol knows.
        """
        connection = self._connection()
        try:
            response = self._send(connection, "POST", path, body, accept="text/event-stream")
            kind = response.headers.get_content_type()
            if response.status != 200 or kind != "text/event-stream":
                text = self._read(response)
                yield Reply(response.status, text if response.status != 200 else f"{kind}: {text}")
                return
            while line := self._line(connection, response):
                name, _, value = line.decode("utf-8", errors="replace").rstrip("\r\n").partition(":")
                if name == "data":
                    yield time.perf_counter(), value.removeprefix(" ")
        finally:
            connection.close()

    def hide(self, text: str) -> str:
        """The text without the key."""
        return scrub(text.replace(self._key, HIDDEN) if self._key else text)

    def _connection(self, within: float | None = None) -> http.client.HTTPConnection:
        left = self.deadline - time.monotonic() if within is None else within
        if left <= 0:
            raise Late("the deadline has passed")
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=left)

    def _request(self, method: str, path: str, body: object = None, within: float | None = None) -> Reply:
        connection = self._connection(within)
        try:
            response = self._send(connection, method, path, body)
            return Reply(response.status, self._read(response))
        finally:
            connection.close()

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object, accept: str = "*/*"
    ) -> http.client.HTTPResponse:
        headers = {"Accept": accept, "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.connect()
        except TimeoutError:
            raise Late(f"no connection for {method} {path}") from None
        except OSError as error:
            raise Unreachable(error.strerror or str(error)) from None
        try:
            connection.request(method, self._base + path, data, headers)
            return connection.getresponse()
        except TimeoutError:
            raise Late(f"no answer to {method} {path}") from None
        except (OSError, http.client.HTTPException) as error:
            raise HungUp(f"{method} {path} got no answer: {error or type(error).__name__}") from None

    def _read(self, response: http.client.HTTPResponse) -> str:
        try:
            return self.hide(response.read().decode("utf-8", errors="replace"))
        except TimeoutError:
            raise Late("an answer stopped in the middle") from None
        except (OSError, http.client.HTTPException) as error:
            raise HungUp(f"an answer ended in the middle: {error or type(error).__name__}") from None

    def _line(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bytes:
        """The next line of a stream, with its end; empty where the connection ended."""
        if connection.sock is not None:
            connection.sock.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        try:
            return response.readline(_LINE)
        except TimeoutError:
            raise Late("a stream stopped in the middle") from None
        except (OSError, http.client.HTTPException) as error:
            raise HungUp(f"{error or type(error).__name__}") from None
