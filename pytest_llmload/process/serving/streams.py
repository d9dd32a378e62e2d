"""Read a streamed answer of any protocol; detect answers that are not a stream or that end too early."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from pytest_llmload.core.units import counted
from pytest_llmload.process.serving.answers import Answer, BadAnswer, CutOff
from pytest_llmload.process.serving.http import Endpoint, HungUp, Reply

#: The last event of a stream in OpenAI's protocol; transformers' server and text-generation-inference do not send it.
_DONE = "[DONE]"


class Refusal(Exception):
    """The endpoint did not accept the request."""

    def __init__(self, path: str, reply: Reply) -> None:
        super().__init__(f"POST {path} answered {reply.status}: {reply.quoted or 'nothing'}")
        self.status = reply.status


def read(endpoint: Endpoint, path: str, body: object, take: Callable[[Answer, float, Any], None]) -> Answer:
    """Return the answer to a request; ``take`` reads each event into it, and sets ``finish`` at the one that ends it.

    Raises Refusal if the status is not 200, CutOff if the stream ends without a ``finish``, BadAnswer, HungUp and Late.
    """
    answer = Answer(perf_counter())
    waited = run_delay()
    is_done = False
    try:
        for event in endpoint.events(path, body):
            if isinstance(event, Reply):
                raise _no_stream(path, event)
            answer.sent = event.sent
            if event.data == _DONE:
                is_done = True
                continue
            take(answer, event.read, _object(path, event.data))
            answer.finished = answer.finished or (event.read if answer.finish else 0.0)
    except HungUp as error:
        # llama-cpp-python sends the last event of an answer that it cut off, and then breaks the connection.
        if not (answer.finish or is_done):
            raise HungUp(f"POST {path}: {_so_far(answer)}, then the connection broke ({error})") from None
    answer.ended = perf_counter()
    answer.starved = run_delay() - waited
    if not answer.finish and is_done:
        raise CutOff(f"POST {path}: {_so_far(answer)}, then the stream ended with {_DONE} and no finish_reason")
    if not answer.finish:
        raise HungUp(f"POST {path}: {_so_far(answer)}, then the stream ended without its last event")
    return answer


def run_delay() -> float:
    """Return the seconds that this thread was ready to run and waited for a processor (proc(5), ``schedstat``)."""
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text(encoding="ascii")
    except OSError:
        # The kernel does not report it: then lumps that a starved client causes are attributed to the server.
        return 0.0
    return int(text.split()[1]) / 1e9


def _so_far(answer: Answer) -> str:
    return f"{counted(len(answer.stamps), 'piece')} of text came"


def _no_stream(path: str, reply: Reply) -> Exception:
    if reply.status != 200:
        return Refusal(path, reply)
    return BadAnswer("stream", f"POST {path} did not answer with a stream of events: {reply.quoted}")


def _object(path: str, data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadAnswer("stream", f"POST {path} streamed an event that is not a JSON object: {Reply(200, data).quoted}")
    if value.get("error"):
        raise BadAnswer("answers", f"POST {path} streamed an error: {Reply(200, json.dumps(value)).quoted}")
    return value
