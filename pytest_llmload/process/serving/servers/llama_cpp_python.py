"""llama-cpp-python's server."""

from __future__ import annotations

from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.openai import OpenAi

_TITLE = "llama.cpp Python API"


class LlamaCppPython(OpenAi):
    name = "llama-cpp-python"
    exact_tokens = "`min_tokens`"
    token_count = "by tokenising the text here: its streams have no `usage`"
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

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return _TITLE in str((says.object("/openapi.json").get("info") or {}).get("title", ""))

    def server(self) -> str:
        return f"llama-cpp-python {(self.says.object('/openapi.json').get('info') or {}).get('version', '')}".strip()

    def told_tokens(self, answer: Answer, new_tokens: int) -> int | None:
        # ``length`` means that the limit of the request was reached.
        return new_tokens if answer.finish == "length" else None
