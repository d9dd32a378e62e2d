"""LiteLLM's proxy in front of a model server."""

from __future__ import annotations

from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.openai import OpenAi

_VERSION = "x-litellm-version"


class LiteLlm(OpenAi):
    name = "LiteLLM"
    exact_tokens = "`ignore_eos`, `min_tokens`, which it passes on"
    token_count = "`usage` of the stream"
    model_id = "`/v1/models`: `model_name` of its configuration"
    version = f"header `{_VERSION}` of an answer"
    concurrency = "as the server behind it"
    #: ``/health`` makes every deployment generate, and hangs while one of them is down.
    health = "/health/readiness"

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        # Releases that report their version there do not report it in their answers.
        return bool({"litellm_version", "db"} & says.object("/health/readiness").keys())

    def key_is_refused(self, key: str) -> bool:
        # Without a database, a wrong key is looked for there all the same (400, "No connected db."), and a request
        # without a key is an internal error (500).
        return super().key_is_refused(key) or self.says.get("/v1/models").status == (400 if key else 500)

    def server(self) -> str:
        told = self.says.object("/health/readiness").get("litellm_version", "")
        return f"litellm {self.endpoint.headers.get(_VERSION, told)}".strip()
