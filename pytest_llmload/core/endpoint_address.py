"""``--llm-endpoint [MODEL_ID=]URL``: the address of a running server, the model to request, and the path to use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

#: The path that a URL may end with, and the ``api=`` that it chooses.
_PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1": ""}
_WRITE = "write http://HOST:PORT or https://HOST, with MODEL_ID= before it if the id is not the model's name"


@dataclass(frozen=True)
class EndpointAddress:
    """The address of a running server."""

    #: Without ``/v1``, user, password, query or a slash at its end.
    url: str
    #: The id that requests ask for; empty where it follows from the model's name.
    model_id: str = ""
    #: ``chat`` or ``completions`` where the address ends with that path; else empty.
    api: str = ""

    @classmethod
    def parse(cls, text: str) -> EndpointAddress:
        """Return the address that a text describes.

        Raises ValueError that says what to write; it does not repeat the text, which may hold a secret.
        """
        found = re.match(r"(?:(?P<id>.+?)=)?(?P<url>\w+://.*)", text)
        url = found["url"].rstrip("/") if found else text
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"this is not the address of a server: {_WRITE}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "an address with a user, a password or a query may hold a secret, and would be printed: write "
                "http://HOST:PORT, and put the key into the environment variable LLM_ENDPOINT_KEY"
            )
        ending = next((path for path in _PATHS if parts.path.endswith(path)), "")
        return cls(url.removesuffix(ending), (found and found["id"]) or "", _PATHS.get(ending, ""))
