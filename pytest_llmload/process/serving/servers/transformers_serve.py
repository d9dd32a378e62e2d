"""``transformers serve``, of transformers 5 and of 4."""

from __future__ import annotations

import json
from typing import Any

from pytest_llmload.process.serving.answers import About, Answer
from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.openai import CHAT, COMPLETIONS, OpenAi, plain

#: Paths that only this server has together.
_OWN = {"/v1/responses", "/v1/audio/transcriptions", CHAT}


def _configured(new_tokens: int) -> dict[str, Any]:
    """Return a whole generation config, since the server refuses unknown fields."""
    config = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return {"generation_config": json.dumps(config)}


class TransformersServe(OpenAi):
    name = "transformers serve"
    exact_tokens = "`generation_config` with `min_new_tokens`"
    token_count = "`usage` of the stream; transformers 4: the request, compared with the text tokenised here"
    model_id = "by answering: its list is the hub's cache (transformers 4: twelve fixed models)"
    version = "not reported by a running server"
    concurrency = "each request in a thread of its own, or `--continuous-batching`"
    fields = (_configured, plain)

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return _paths(says) >= _OWN

    @property
    def as_told(self) -> bool:  # type: ignore[override]
        return self._ways == [(COMPLETIONS, _configured)]

    def about(self) -> About:
        return About(server=self.name)

    def told_tokens(self, answer: Answer, new_tokens: int) -> int | None:
        # Its minimum equals its maximum, and the server accepted only a whole config.
        return new_tokens if self._ways[0][1] is _configured else None


def _paths(says: SelfDescription) -> set[str]:
    paths = says.object("/openapi.json").get("paths")
    return set(paths) if isinstance(paths, dict) else set()
