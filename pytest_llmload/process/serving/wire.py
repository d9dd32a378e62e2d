"""One HTTP exchange whose reads share one deadline, and which records the times of its request and its last read.

httpx limits the time of each read, not of all together, and does not show which bytes came together. httpcore's network
backend is the public interface for both.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Any

import httpcore
import httpx


class Wire(httpcore.NetworkStream):
    """A connection that times out at the deadline, and records when it was first written and last read."""

    def __init__(self, stream: httpcore.NetworkStream, exchange: Exchange) -> None:
        self._stream = stream
        self._exchange = exchange

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._exchange.left())
        self._exchange.moment = time.perf_counter()
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._exchange.sent = self._exchange.sent or time.perf_counter()
        self._stream.write(buffer, self._exchange.left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return Wire(self._stream.start_tls(ssl_context, server_hostname, self._exchange.left()), self._exchange)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Exchange(httpcore.NetworkBackend):
    """Connects once; raises httpcore.ReadTimeout once ``deadline`` (``time.monotonic``) has passed."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._backend = httpcore.SyncBackend()
        #: When the request was sent, after the connection was made: other clients keep theirs for the next request.
        self.sent = 0.0
        #: When the last bytes were read (``time.perf_counter``).
        self.moment = 0.0

    def left(self) -> float:
        """Return the seconds until the deadline."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return left

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._backend.connect_tcp(host, port, self.left(), local_address, socket_options)
        return Wire(stream, self)


class _Body(httpx.SyncByteStream):
    """The body of an httpcore answer, in httpx's form."""

    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


class Transport(httpx.BaseTransport):
    """One exchange for an httpx client. Its errors are those of httpcore."""

    def __init__(self, exchange: Exchange, tls: ssl.SSLContext | None) -> None:
        self._pool = httpcore.ConnectionPool(ssl_context=tls, network_backend=exchange, max_connections=1)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        head, body = request.headers.raw, request.read()
        answer = self._pool.handle_request(
            httpcore.Request(request.method, target, headers=head, content=body, extensions=request.extensions)
        )
        return httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions)

    def close(self) -> None:
        self._pool.close()
