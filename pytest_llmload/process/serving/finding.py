"""Find a server: where and with which key it answers, that it is healthy, and of what kind it is."""

from __future__ import annotations

import time
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from pytest_llmload.core import results
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.process.serving.http import Endpoint, HungUp, Late, Unreachable
from pytest_llmload.process.serving.server_process import ServerProcess
from pytest_llmload.process.serving.servers import identify
from pytest_llmload.process.serving.servers.base import REFUSED_KEY, SelfDescription, ServerKind
from pytest_llmload.process.serving.servers.transformers_serve import TransformersServe
from pytest_llmload.system.process_exit import Died

#: The environment variable with the endpoint's key. No other one is read, since its key may be for another service.
KEY = "LLM_ENDPOINT_KEY"
_NO_PATH = (404, 405)
_MODELS = "/v1/models"
#: Paths under which servers and gateways often put the API.
_PREFIXES = ("/openai", "/api", "/llm")
#: Seconds to wait for the answer at one of these paths.
_PATIENCE = 2.0
#: Seconds between two health checks of a running endpoint.
_LOOK = 0.2


def wait(endpoint: Endpoint, api: str, key: str, deadline: float, allowed: str) -> ServerKind:
    """Return the kind of a running endpoint once it is healthy; ``api`` is its protocol, empty if unknown.

    Raises MachineError if it cannot be used, and Died if it is not healthy by the deadline; ``allowed`` says in words
    how long that is.
    """
    while True:
        try:
            kind, why = look(endpoint, api, ours=False, key=key)
        except Unreachable as error:
            raise MachineError(f"the endpoint cannot be reached: {error} (--llm-endpoint)") from None
        if not why:
            return kind
        if time.monotonic() > deadline:
            message = f"the endpoint was not healthy within {allowed}: {why}"
            raise Died(ErrorInfo(message=message, phase="start"), outcome=results.TIMEOUT)
        # The endpoint sends no event when it becomes ready.
        time.sleep(_LOOK)


def wait_for_start(
    server: ServerProcess, endpoint: Endpoint, api: str, key: str, deadline: float, *, ours: bool
) -> ServerKind:
    """Return the kind of a started server once it is healthy; see :func:`look` for the arguments.

    Raises Died if it ends, or is not healthy by the deadline, and MachineError if it cannot be used.
    """
    found: list[ServerKind] = []

    def complaint() -> str:
        try:
            kind, why = look(endpoint, api, ours=ours, key=key)
        except Unreachable as error:
            return str(error)
        found[:] = [kind]
        return why

    server.wait_until(complaint, deadline, endpoint.is_open)
    return found[0]


def look(endpoint: Endpoint, api: str, *, ours: bool, key: str) -> tuple[ServerKind, str]:
    """Return the kind of server, and why it cannot serve yet; empty if it can.

    ``ours`` is true for a ``transformers serve`` that the load started. Raises Unreachable, and MachineError if the key
    is refused or there is no API under the address.
    """
    says = SelfDescription(endpoint)
    if ours:
        # Its list of models would read the hub.
        kind: ServerKind = TransformersServe(endpoint, says)
        return kind, kind.unhealthy()
    kind = identify(endpoint, says, api)
    status = says.get(_MODELS).status
    if kind.key_is_refused(key):
        raise refused_key(status, key)
    # nginx answers 400 to a request without TLS, others close the connection.
    if status in (0, 400) and endpoint.only_speaks_tls():
        raise MachineError("the endpoint speaks TLS: write https:// in place of http:// (--llm-endpoint)")
    if status in _NO_PATH and says.get(kind.health).status in _NO_PATH:
        raise wrong_path(endpoint, status)
    return kind, kind.unhealthy()


def refused_key(status: int, key: str) -> MachineError:
    """Return the error for an endpoint that does not accept the key."""
    state = f"it refused the key in {KEY}" if key else f"it needs a key; set {KEY}"
    return MachineError(f"the endpoint answers {status}: {state}")


def wrong_path(endpoint: Endpoint, status: int) -> MachineError:
    """Return the error for an address without an API under it; it names a path with one, if there is one."""
    parts = urlsplit(endpoint.url)
    root = f"{parts.scheme}://{parts.netloc}"
    said = f"there is no API under the address: GET {parts.path}{_MODELS} answers {status}"
    parents = [str(parent).rstrip("/") for parent in PurePosixPath(parts.path or "/").parents]
    for prefix in dict.fromkeys([*parents, *(f"{parts.path}{prefix}" for prefix in _PREFIXES), *_PREFIXES]):
        if prefix == parts.path:
            continue
        try:
            other = endpoint.get(_MODELS, _PATIENCE, root + prefix).status
        except (Unreachable, HungUp, Late):
            continue
        if other == 200 or other in REFUSED_KEY:
            write = f"end the address with {prefix}" if prefix else "leave its path out"
            return MachineError(f"{said}, and {prefix}{_MODELS} answers {other}: {write} (--llm-endpoint)")
    return MachineError(f"{said}; write the base URL that you give to clients of OpenAI's API (--llm-endpoint)")
