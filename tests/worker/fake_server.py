"""Servers that are not here: text-generation-inference and vLLM as they answer, and others with something wrong.

``python fake_server.py PORT MODE`` is one as a process; :func:`serving` is one in a thread. A mode is words joined by
``+``: ``openai``, ``chat``, ``vllm`` or ``tgi``, and what is wrong with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "org/model"
VLLM_METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="661",num_cpu_blocks="None"} 1.0
vllm:num_requests_running{engine="0",model_name="org/model"} 0.0
"""


#: Never set: the time of one token.
PACE = threading.Event()


class Handler(BaseHTTPRequestHandler):
    mode: tuple[str, ...] = ()
    model = MODEL
    seen: list[dict[str, Any]]
    cache_tokens = 1000
    #: The path below which it answers.
    prefix = ""
    #: Answers that run now; one number, shared by all requests.
    running: list[int]
    #: Set once an answer has stopped in the middle.
    hung = threading.Event()

    def log_message(self, *_: object) -> None:
        pass

    def has(self, word: str) -> bool:
        return word in self.mode

    def send(self, status: int, body: object, kind: str = "application/json") -> None:
        data = (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.has("locked") and self.headers.get("Authorization") != "Bearer opensesame":
            return self.send(401, {"error": "who are you?"})
        if self.has("litellm") and self.path == "/health/readiness":
            return self.send(200, {"status": "healthy", "db": "Not connected"})
        if self.has("litellm") and (key := self.headers.get("Authorization")) != "Bearer opensesame":
            return self.send(400 if key else 500, {"error": {"message": "No connected db."}})
        if self.prefix and not self.path.startswith(self.prefix):
            return self.send(404, {"detail": "Not Found"})
        self.path = self.path.removeprefix(self.prefix)
        if self.path == "/health":
            return self.send(503 if self.has("unhealthy") else 200, "loading" if self.has("unhealthy") else "")
        if self.path == "/info" and self.has("tgi"):
            served = "org/other" if self.has("other") else self.model
            info = {"model_id": served, "model_sha": "abc123", "max_concurrent_requests": 128, "version": "3.3.7"}
            return self.send(200, {**info, "max_batch_total_tokens": self.cache_tokens})
        if self.path == "/v1/models" and not self.has("tgi"):
            served = "org/other" if self.has("other") else self.model
            owner = "vllm" if self.has("vllm") else "acme"
            return self.send(200, {"object": "list", "data": [{"id": served, "object": "model", "owned_by": owner}]})
        if self.path == "/openapi.json" and self.has("llama_cpp"):
            return self.send(200, {"info": {"title": "🦙 llama.cpp Python API", "version": "0.3.36"}})
        if self.path == "/version" and self.has("vllm"):
            return self.send(200, {"version": "0.11.0"})
        if self.path == "/metrics" and self.has("vllm"):
            return self.send(200, VLLM_METRICS, "text/plain")
        return self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({**body, "path": self.path})
        if self.has("guarded") and self.headers.get("Authorization") != "Bearer opensesame":
            return self.send(401, {"error": "who are you?"})
        if self.has("500"):
            return self.send(500, "Internal Server Error", "text/plain")
        if self.has("llama_cpp") and self.path == "/extras/tokenize/count":
            return self.send(200, {"count": len(body["input"].split())})
        known = (
            "/generate_stream" if self.has("tgi") else "/v1/chat/completions" if self.has("chat") else "/v1/completions"
        )
        if self.path.removeprefix(self.prefix) != known:
            return self.send(404, {"detail": "Not Found"})
        served = "org/other" if self.has("other") else self.model
        if not self.has("tgi") and body["model"] != served and not self.has("any"):
            return self.send(404, {"message": f"The model `{body['model']}` does not exist."})
        if self.has("strict") and "ignore_eos" in body:
            return self.send(422, {"detail": "Unexpected fields in the request: {'ignore_eos'}"})
        if self.has("page"):
            return self.send(200, "<html>Welcome to nginx!</html>", "text/html")
        if self.has("full") and body["max_tokens"] > 1:
            return self.send(400, {"error": {"message": "min_tokens must be less than or equal to max_tokens=1"}})
        if not (self.has("tgi") or body.get("stream")):
            usage = {"prompt_tokens": 16, "completion_tokens": self.wanted(body)}
            return self.send(200, {"model": body["model"], "choices": [{"text": "a\x7f"}], "usage": usage})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.running[0] += 1
        self.stream(body)
        self.running[0] -= 1
        return None

    def event(self, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        # text-generation-inference writes no blank after the colon.
        self.wfile.write(f"data:{'' if self.has('tgi') else ' '}{text}\n\n".encode())
        self.wfile.flush()

    def wanted(self, body: dict[str, Any]) -> int:
        tokens = (body.get("parameters") or {}).get("max_new_tokens") or body["max_tokens"]
        return min(tokens, 2) if self.has("short") else int(tokens)

    def stream(self, body: dict[str, Any]) -> None:
        wanted = self.wanted(body)
        pieces = [f" w{index}" for index in range(wanted)]
        for index, piece in enumerate([] if self.has("silent") else pieces):
            # A token takes its time; what is written at once is read at once.
            PACE.wait(0.002)
            if index == 2:
                self.fault()
            if self.has("tgi"):
                token = {"id": index, "text": piece, "logprob": 0.0, "special": False}
                if index < wanted - 1:
                    self.event({"index": index + 1, "token": token, "generated_text": None, "details": None})
                    continue
                details = {"finish_reason": "length", "generated_tokens": wanted, "input_length": 16}
                self.event({"index": index + 1, "token": token, "generated_text": "…", "details": details})
            else:
                self.event(self.chunk([self.choice(piece)]))
        if self.has("cuts") and self.running[0] > 1:
            return self.event("[DONE]")
        if not self.has("tgi"):
            self.event(self.chunk([{"index": 0, **self.choice(""), "finish_reason": "length"}]))
            count = 0 if self.has("silent") else wanted
            if not self.has("uncounted"):
                self.event({**self.chunk([]), "usage": {"prompt_tokens": 16, "completion_tokens": count}})
            self.event("[DONE]")

    def fault(self) -> None:
        if self.has("dies"):
            print("CUDA error: device-side assert triggered", flush=True)
            os._exit(3)
        if self.has("segfaults"):
            os.kill(os.getpid(), 11)
        if self.has("hangs-up"):
            self.connection.close()
            raise ConnectionAbortedError
        if self.has("hangs"):
            self.hung.set()
            PACE.wait(30)
        if self.has("garbage"):
            self.event("<<< not json >>>")
        if self.has("error"):
            self.event({"error": {"message": "CUDA out of memory", "code": 500}})

    def choice(self, piece: str) -> dict[str, Any]:
        name = "reasoning" if self.has("reasons") else "content"
        return {"delta": {name: piece}} if self.has("chat") else {"text": piece}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": "x", "model": "org/impostor" if self.has("impostor") else self.model, "choices": choices}


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        pass


def server(port: int, mode: str, **attributes: Any) -> Quiet:
    words = tuple(mode.split("+"))
    handler = type("Own", (Handler,), {"mode": words, "seen": [], "running": [0], **attributes})
    return Quiet(("127.0.0.1", port), handler)


@contextlib.contextmanager
def serving(
    mode: str, tls: tuple[Path, Path] | None = None, **attributes: Any
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server in a thread, and the requests that it is sent; it speaks TLS if it has a certificate."""
    own = server(0, mode, **attributes)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        own.socket = context.wrap_socket(own.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{own.server_port}", own.RequestHandlerClass.seen  # type: ignore[attr-defined]
    finally:
        own.shutdown()
        own.server_close()


def main(port: str, mode: str, model: str = MODEL, megabytes: str = "0") -> None:
    print("loading the model", flush=True)
    if "crash" in mode:
        print("ValueError: no such architecture", flush=True)
        sys.exit(7)
    if "deaf" in mode:
        print("still compiling kernels", flush=True)
        signal.pause()
    held = bytearray(os.urandom(1 << 20)) * int(megabytes)
    server(int(port), mode, model=model, held=held).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
