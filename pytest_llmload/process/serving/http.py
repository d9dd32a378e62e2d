"""The HTTP client: one connection for each request, one deadline for all requests, and server-sent events."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpcore
import httpx

from pytest_llmload.core.portable import HIDDEN, scrub
from pytest_llmload.process.serving.wire import Exchange, Transport

#: The most characters of a body that a message quotes.
_QUOTED = 300


class Unreachable(Exception):
    """There is no server at the address, or it cannot be connected to."""


class HungUp(Exception):
    """The connection ended before the answer did."""


class Late(Exception):
    """There was no answer within the deadline."""


@dataclass(frozen=True)
class Reply:
    """A whole answer, as it came: only :attr:`quoted` may be shown, in which secrets are hidden."""

    status: int
    body: str
    #: Header values, by their names in lower case.
    headers: dict[str, str] = field(default_factory=dict)
    #: What hides secrets in a text.
    hide: Callable[[str], str] = scrub

    def json(self) -> Any:
        """Return the body as JSON; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def quoted(self) -> str:
        """Return the body as one line, cut to a length that a message can quote."""
        text = " ".join(self.hide(self.body).split())
        return text if len(text) <= _QUOTED else f"{text[:_QUOTED]} …"


class Event(NamedTuple):
    """One event of a stream. Times are those of ``time.perf_counter``."""

    #: When the request was sent, after the connection was made.
    sent: float
    #: When the event's bytes were read.
    read: float
    data: str


class Endpoint:
    """The address of a server, and the client that sends it requests.

    The deadline ends a whole answer, however slowly its bytes come; httpx's own time-outs are for each read.
    """

    def __init__(self, url: str, key: str = "") -> None:
        # The base URL of OpenAI's API ends with /v1, and all requested paths begin with it.
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        #: Headers of the last stream.
        self.headers: dict[str, str] = {}
        #: The time (``time.monotonic``) until which answers are waited for.
        self.deadline = time.monotonic() + 60
        # The certificates that the system trusts, or those of SSL_CERT_FILE. Built once, since it reads them all.
        self._tls = ssl.create_default_context() if url.startswith("https") else None

    def get(self, path: str, within: float | None = None, base: str | None = None) -> Reply:
        """Request a path under the address, or under ``base``; wait for ``within`` seconds, or until the deadline.

        Raises Unreachable, HungUp and Late.
        """
        return self._request("GET", path, within=within, base=base)

    def post(self, path: str, body: object) -> Reply:
        """Send a body as JSON. Raises Unreachable, HungUp and Late."""
        return self._request("POST", path, body)

    def is_open(self) -> bool:
        """Return true if a server listens on the port."""
        try:
            self._connection().close()
        except OSError:
            return False
        return True

    def only_speaks_tls(self) -> bool:
        """Return true if the address begins with http://, but the server speaks TLS."""
        if self._tls is not None:
            return False
        # Any certificate will do: nothing is sent.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with self._connection() as connection:
                context.wrap_socket(connection).close()
        except OSError:
            return False
        return True

    def _connection(self) -> socket.socket:
        parts = httpx.URL(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return socket.create_connection((parts.host, port), timeout=1)

    def events(self, path: str, body: object) -> Iterator[Event | Reply]:
        """Yield each event of a stream.

        Events of one read have the same time, so that it shows which events arrived together; httpx-sse gives lines
        without times. Yield a single Reply if the answer is not a stream. Raises Unreachable, HungUp and Late. The
        iterator ends with the connection: only the protocol knows whether the answer was complete.
        """
        with self._answer("POST", path, body, accept="text/event-stream") as (response, exchange):
            self.headers = dict(response.headers.items())
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if response.status_code != 200 or kind != "text/event-stream":
                reply = self._whole(response)
                yield reply if reply.status != 200 else dataclasses.replace(reply, body=f"{kind}: {reply.body}")
                return
            decoder, rest = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
            for data in response.iter_bytes():
                *lines, rest = (rest + decoder.decode(data)).split("\n")
                for line in lines:
                    name, _, value = line.rstrip("\r").partition(":")
                    if name == "data":
                        yield Event(exchange.sent, exchange.moment, value.removeprefix(" "))

    def hide(self, text: str) -> str:
        """Return a text with the key removed."""
        return scrub(text.replace(self._key, HIDDEN) if self._key else text)

    def _request(
        self, method: str, path: str, body: object = None, within: float | None = None, base: str | None = None
    ) -> Reply:
        with self._answer(method, path, body, within=within, base=base) as (response, _):
            return self._whole(response)

    def _whole(self, response: httpx.Response) -> Reply:
        text = response.read().decode("utf-8", errors="replace")
        return Reply(response.status_code, text, dict(response.headers.items()), self.hide)

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: object = None,
        accept: str = "*/*",
        within: float | None = None,
        base: str | None = None,
    ) -> Iterator[tuple[httpx.Response, Exchange]]:
        """Open the answer; raise errors while it is read as errors of this module."""
        exchange = Exchange(self.deadline if within is None else time.monotonic() + within)
        headers = {"Accept": accept, **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        address = (self.url if base is None else base) + path
        # The environment's proxies are for other addresses, and would be part of every measured time.
        client = httpx.Client(transport=Transport(exchange, self._tls), trust_env=False)
        what, begun = f"{method} {path}", False
        try:
            request = client.build_request(method, address, json=body, headers=headers)
            response = client.send(request, stream=True)
            begun = True
            yield response, exchange
        except httpcore.ConnectTimeout:
            raise Late(f"no connection for {what}") from None
        except httpcore.ConnectError as error:
            raise Unreachable(_why_unreachable(error)) from None
        except httpcore.TimeoutException:
            raise Late(f"a stream stopped in the middle ({what})" if begun else f"no answer to {what}") from None
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            reason = str(error) or type(error).__name__
            raise HungUp(reason if begun else f"{what} got no answer: {reason}") from None
        finally:
            client.close()


def _why_unreachable(error: httpcore.ConnectError) -> str:
    """Return the cause as text, with the setting that helps, if there is one."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"its certificate is not trusted: set SSL_CERT_FILE to the authority's file ({text})"
    if "SSL" in text:
        return f"it does not speak TLS: write http:// in place of https:// ({text})"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return text
