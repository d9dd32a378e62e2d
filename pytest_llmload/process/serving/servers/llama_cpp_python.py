"""llama-cpp-python's server."""

from __future__ import annotations

import math

from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.openai import OpenAi
from pytest_llmload.worker.model.prompts import Prompt

_TITLE = "llama.cpp Python API"


class LlamaCppPython(OpenAi):
    name = "llama-cpp-python"
    exact_tokens = "`min_tokens`"
    token_count = "`usage` of a second answer, which is not a stream: its streams have none"
    told_by = "by the usage of answers that are not streams"
    model_id = "`/v1/models`: `--model_alias`, else the path of the file; it answers to any id"
    version = "`/openapi.json`"
    concurrency = "one: by default another request ends the answer that runs (`--interrupt_requests False`: it waits)"
    #: ``/health`` does not exist.
    health = "/v1/models"
    lists_what_it_serves = True
    cut_off = (
        "llama-cpp-python's server ends a running answer when another request arrives; start it with "
        "--interrupt_requests False, so that other requests wait"
    )
    stops_early = "its context is full: prompt and new tokens must fit into --n_ctx"
    #: The most tokens, prompt and answer together, that are known to fit into its context.
    _fitting: float = 0.0

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return _TITLE in str((says.object("/openapi.json").get("info") or {}).get("title", ""))

    def server(self) -> str:
        return f"llama-cpp-python {(self.says.object('/openapi.json').get('info') or {}).get('version', '')}".strip()

    def told_tokens(self, answer: Answer, new_tokens: int) -> int | None:
        # ``length`` also ends an answer that fills the context: the server lowers the limit of the request without a
        # word. What is not a stream has a usage.
        if answer.finish != "length":
            return None
        needed = self._tokens_of(answer.prompt) + new_tokens
        if needed <= self._fitting:
            return new_tokens
        reply = self._unstreamed(self.model, answer.prompt, new_tokens)
        usage = (reply.json() or {}).get("usage") if reply.status == 200 else None
        if not usage:
            return None
        if usage["completion_tokens"] >= new_tokens:
            self._fitting = max(self._fitting, needed)
        return int(usage["completion_tokens"])

    def _tokens_of(self, prompt: Prompt) -> float:
        """Return the number of a prompt's tokens by its own tokenizer; infinity if it is not a text."""
        if not isinstance(prompt, str) or self.chat:
            return math.inf
        reply = self.endpoint.post("/extras/tokenize/count", {"model": self.model, "input": prompt})
        return int(reply.json()["count"]) if reply.status == 200 else math.inf
