"""Reading a streamed answer, whatever the protocol: what is no stream, and what ends too early."""

from __future__ import annotations

import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

from pytest_llmload.process.serving.api import Answer, BadAnswer
from pytest_llmload.process.serving.http import Endpoint, HungUp, Reply

#: How OpenAI's protocol ends a stream; transformers' server and text-generation-inference leave it away.
_DONE = "[DONE]"


class Refusal(Exception):
    """The request itself was not accepted."""

    def __init__(self, path: str, reply: Reply) -> None:
        super().__init__(f"POST {path} answered {reply.status}: {reply.quoted or 'nothing'}")
        self.status = reply.status


def read(endpoint: Endpoint, path: str, body: object, take: Callable[[Answer, float, Any], bool]) -> Answer:
    """The answer to a request; ``take`` reads one event into it, and says whether it is one that ends the answer.

    Raises Refusal for another status than 200, BadAnswer, HungUp and Late.
    """
    answer = Answer(perf_counter())
    complete = False
    try:
        for event in endpoint.events(path, body):
            if isinstance(event, Reply):
                raise _no_stream(path, event)
            moment, data = event
            if data == _DONE:
                complete = True
                continue
            complete = take(answer, moment, _object(path, data)) or complete
    except HungUp as error:
        if not complete:
            raise HungUp(f"POST {path}: {_so_far(answer)}, then the connection broke ({error})") from None
    answer.ended = perf_counter()
    if not complete:
        raise HungUp(f"POST {path}: {_so_far(answer)}, then the stream ended without its last event")
    answer.check(f"POST {path}")
    return answer


def _so_far(answer: Answer) -> str:
    count = len(answer.stamps)
    return f"{count} piece{'s' * (count != 1)} of text came"


def _no_stream(path: str, reply: Reply) -> Exception:
    if reply.status != 200:
        return Refusal(path, reply)
    return BadAnswer("stream", f"POST {path} answered no stream of events: {reply.quoted}")


def _object(path: str, data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadAnswer("stream", f"POST {path} streamed an event that is no JSON object: {Reply(200, data).quoted}")
    if value.get("error"):
        raise BadAnswer("answers", f"POST {path} streamed an error: {Reply(200, json.dumps(value)).quoted}")
    return value
