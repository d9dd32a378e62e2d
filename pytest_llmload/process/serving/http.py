"""The client's end of HTTP: one connection a request, one deadline for all of them, server-sent events."""

from __future__ import annotations

import codecs
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpcore
import httpx

from pytest_llmload.core.portable import HIDDEN, scrub
from pytest_llmload.process.serving.wire import Exchange, Transport

#: Characters of a body that a message quotes.
_QUOTED = 300


class Unreachable(Exception):
    """No server answers at the address."""


class HungUp(Exception):
    """The connection ended before the answer did."""


class Late(Exception):
    """There was no answer within the deadline."""


@dataclass(frozen=True)
class Reply:
    """A whole answer."""

    status: int
    body: str
    #: By their names in lower case.
    headers: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """Return the body as JSON; None where it is not JSON."""
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
    """Where a server answers.

    The deadline ends a whole answer, however slowly its bytes come; httpx's own time-outs are for each read.
    """

    def __init__(self, url: str, key: str = "") -> None:
        # As clients of OpenAI's API are given it; the paths asked for begin with it.
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        #: Headers of the last stream.
        self.headers: dict[str, str] = {}
        #: A moment of ``time.monotonic`` after which no answer is waited for.
        self.deadline = time.monotonic() + 60
        # The certificates that the system trusts, or those of SSL_CERT_FILE. Built once: it reads them all.
        self._tls = ssl.create_default_context() if url.startswith("https") else None

    def get(self, path: str, within: float | None = None, base: str | None = None) -> Reply:
        """Ask for a path, ``within`` seconds at most whatever the deadline, below ``base`` instead of the address.

        Raise Unreachable, HungUp and Late.
        """
        return self._request("GET", path, within=within, base=base)

    def post(self, path: str, body: object) -> Reply:
        """Send a body as JSON. Raise Unreachable, HungUp and Late."""
        return self._request("POST", path, body)

    def is_open(self) -> bool:
        """Return whether a server listens on the port."""
        parts = httpx.URL(self.url)
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.host, port), timeout=1).close()
        except OSError:
            return False
        return True

    def events(self, path: str, body: object) -> Iterator[tuple[float, str] | Reply]:
        """Yield the data of each event of a stream, with the moment when its bytes were read (``time.perf_counter``).

        Events that one read brought have one moment, so that what arrived together can be told from what did not;
        httpx-sse gives lines without it. Yield a single Reply where the answer is not a stream. Raise Unreachable,
        HungUp and Late. The end of the connection is the end of the iterator: whether it was the end of the answer,
        only the protocol knows.
        """
        with self._answer("POST", path, body, accept="text/event-stream") as (response, exchange):
            self.headers = dict(response.headers.items())
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if response.status_code != 200 or kind != "text/event-stream":
                reply = self._whole(response)
                yield reply if reply.status != 200 else Reply(200, f"{kind}: {reply.body}")
                return
            decoder, rest = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
            for data in response.iter_bytes():
                *lines, rest = (rest + decoder.decode(data)).split("\n")
                for line in lines:
                    name, _, value = line.rstrip("\r").partition(":")
                    if name == "data":
                        yield exchange.moment, value.removeprefix(" ")

    def hide(self, text: str) -> str:
        """Return a text without the key."""
        return scrub(text.replace(self._key, HIDDEN) if self._key else text)

    def _request(
        self, method: str, path: str, body: object = None, within: float | None = None, base: str | None = None
    ) -> Reply:
        with self._answer(method, path, body, within=within, base=base) as (response, _):
            return self._whole(response)

    def _whole(self, response: httpx.Response) -> Reply:
        text = response.read().decode("utf-8", errors="replace")
        return Reply(response.status_code, self.hide(text), dict(response.headers.items()))

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
        """Give the answer's beginning; what breaks while it is read is raised as an error of this module."""
        exchange = Exchange(self.deadline if within is None else time.monotonic() + within)
        headers = {"Accept": accept, **({"Authorization": f"Bearer {self._key}"} if self._key else {})}
        address = (self.url if base is None else base) + path
        # A proxy for other addresses is not on the way to this one, and would be part of every time.
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
    """Return the cause in words, with the setting where there is one."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"its certificate is not trusted: name the authority's file in SSL_CERT_FILE ({text})"
    if "SSL" in text:
        return f"it does not speak TLS: write http:// in place of https:// ({text})"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return text
