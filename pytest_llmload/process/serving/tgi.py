"""text-generation-inference's own API: ``/info`` and ``/generate_stream``."""

from __future__ import annotations

from typing import Any

from pytest_llmload.process.serving import streams
from pytest_llmload.process.serving.api import About, Answer, Api, BadAnswer
from pytest_llmload.process.serving.http import Endpoint, Reply

_STREAM = "/generate_stream"


class Tgi(Api):
    """Each event is one token, with its id; the last one counts them."""

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.notes.append("text-generation-inference ends at the end of the sequence")

    def about(self) -> About:
        info = self.endpoint.get("/info").json()
        if not is_info(info):
            raise BadAnswer("answers", "GET /info does not answer as text-generation-inference does")
        capacity = info.get("max_batch_total_tokens")
        return About(
            (str(info["model_id"]),),
            f"text-generation-inference {info.get('version', '')}".strip(),
            capacity if isinstance(capacity, int) else None,
            str(info.get("model_sha") or ""),
        )

    def answer(self, prompt: str, new_tokens: int) -> Answer:
        parameters = {"max_new_tokens": new_tokens, "do_sample": False, "details": True}
        try:
            answer = streams.read(self.endpoint, _STREAM, {"inputs": prompt, "parameters": parameters}, _take)
        except streams.Refusal as refusal:
            raise BadAnswer("answers", str(refusal)) from None
        return answer


def is_info(info: Any) -> bool:
    """Whether ``/info`` answered as text-generation-inference does."""
    return isinstance(info, dict) and isinstance(info.get("model_id"), str) and "max_concurrent_requests" in info


def speaks(endpoint: Endpoint) -> bool:
    reply: Reply = endpoint.get("/info")
    return reply.status == 200 and is_info(reply.json())


def _take(answer: Answer, moment: float, event: dict[str, Any]) -> bool:
    token = event.get("token")
    if isinstance(token, dict):
        answer.ids.append(int(token.get("id", -1)))
        answer.add(moment, str(token.get("text", "")))
    details = event.get("details")
    if isinstance(details, dict):
        answer.tokens, answer.prompt_tokens = details.get("generated_tokens"), details.get("input_length")
    return event.get("generated_text") is not None
