"""text-generation-inference's own API: ``/info`` and ``/generate_stream``."""

from __future__ import annotations

from typing import Any

from pytest_llmload.process.serving import streams
from pytest_llmload.process.serving.answers import About, Answer, BadAnswer
from pytest_llmload.process.serving.servers.base import SelfDescription, ServerKind
from pytest_llmload.process.serving.servers.openai import RequestRefused
from pytest_llmload.worker.model.prompts import Prompt

_STREAM = "/generate_stream"


class Tgi(ServerKind):
    """Streams one token in each event, with its id; the last event has their number."""

    name = "text-generation-inference"
    exact_tokens = "not possible: it stops at the end of the sequence"
    token_count = "`details` of the last event"
    token_ids = "`token.id`"
    model_id = "`/info`: `model_id`"
    version = "`/info`: `version`"
    capacity = "`/info`: `max_batch_total_tokens`"
    concurrency = "up to `--max-concurrent-requests`"
    lists_what_it_serves = True
    stops_early = "text-generation-inference has no option to continue after the end of the sequence"

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return is_info(says.object("/info"))

    def about(self) -> About:
        info = self.says.object("/info")
        if not is_info(info):
            raise BadAnswer("answers", "GET /info does not answer as text-generation-inference does")
        capacity = info.get("max_batch_total_tokens")
        return About(
            (str(info["model_id"]),),
            f"text-generation-inference {info.get('version', '')}".strip(),
            capacity if isinstance(capacity, int) else None,
            str(info.get("model_sha") or ""),
        )

    def answer(self, prompt: Prompt, new_tokens: int) -> Answer:
        parameters = {"max_new_tokens": new_tokens, "do_sample": False, "details": True}
        try:
            answer = streams.read(self.endpoint, _STREAM, {"inputs": prompt, "parameters": parameters}, _take)
        except streams.Refusal as refusal:
            raise RequestRefused(str(refusal), refusal.status) from None
        answer.check(f"POST {_STREAM}", None)
        return answer


def is_info(info: dict[str, Any]) -> bool:
    """Return true if ``/info`` answered as text-generation-inference does."""
    return isinstance(info.get("model_id"), str) and "max_concurrent_requests" in info


def _take(answer: Answer, moment: float, event: dict[str, Any]) -> None:
    token = event.get("token")
    if isinstance(token, dict):
        if isinstance(token.get("id"), int):
            answer.ids.append(token["id"])
            answer.first_ids += not answer.stamps or moment == answer.stamps[0]
        answer.add(moment, str(token.get("text", "")))
    details = event.get("details")
    if isinstance(details, dict):
        answer.tokens, answer.prompt_tokens = details.get("generated_tokens"), details.get("input_length")
        answer.finish = str(details.get("finish_reason") or "")
    if event.get("generated_text") is not None:
        answer.finish = answer.finish or "length"
