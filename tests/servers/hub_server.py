"""A stand-in for the Hugging Face hub on this machine: what its real client asks of it, and nothing more."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its clients use to download a snapshot."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    #: Files whose size it gives otherwise than it is.
    sizes: ClassVar[dict[str, int]] = {}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        refused = {
            "/api/models/org/gated/": (403, "GatedRepo"),
            "/api/models/org/missing/": (404, "RepoNotFound"),
            "/api/models/org/model/revision/v9": (404, "RevisionNotFound"),
            "/api/models/org/broken/": (500, ""),
        }
        for prefix, (status, code) in refused.items():
            if f"{path}/".startswith(prefix if prefix.endswith("/") else f"{prefix}/"):
                return self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        if match := re.fullmatch(r"/api/models/org/model/revision/(main|v1|\w{40})", path):
            siblings = [
                {"rfilename": name, "size": self.sizes.get(name, len(data))} for name, data in self.files.items()
            ]
            return self.answer(200, {"id": "org/model", "sha": COMMIT, "siblings": siblings, "private": False})
        if path.startswith("/api/models/org/model/tree/"):
            return self.answer(200, [self.entry(name) for name in self.files])
        if match := re.fullmatch(r"/org/model/resolve/(main|v1|\w{40})/(.+)", path):
            data = self.files.get(match[2])
            if data is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                self.asked.append(match[2])
            etag = hashlib.sha256(data).hexdigest()
            extra = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data))}
            return self.answer(200, data, extra)
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def answer(self, status: int, body: object, extra: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(extra or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: the output is the test's."""


@contextmanager
def serving() -> Iterator[str]:
    """Serve ``Hub.files`` as org/model; the address is for HF_ENDPOINT."""
    Hub.asked, Hub.sizes = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
