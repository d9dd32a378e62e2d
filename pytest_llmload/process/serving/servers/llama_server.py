"""llama.cpp's own server, ``llama-server``."""

from __future__ import annotations

import re

from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.openai import OpenAi

_LOADED = re.compile(r"^(\d+)\.(\d{2})\.(\d{3})\.\d{3} I .*\bmodel loaded$", re.MULTILINE)


class LlamaServer(OpenAi):
    name = "llama-server"
    exact_tokens = "`ignore_eos`"
    token_count = "`usage` of the stream"
    model_id = "`/v1/models`: `--alias`, else the path of the file; it answers to any id"
    version = "`/props`: `build_info`"
    capacity = "`/props`: `n_ctx` of a slot times `total_slots`"
    concurrency = "`--parallel` slots; further requests wait"
    lists_what_it_serves = True
    stops_early = "a slot's context is full: prompt and new tokens must fit into --ctx-size divided by --parallel"

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return "llamacpp" in says.owners or says.header("server") == "llama.cpp"

    def server(self) -> str:
        return f"llama-server {self.says.object('/props').get('build_info', '')}".strip()

    def phases_of(self, log: str) -> dict[str, float]:
        # Its lines begin with the time since its start: minutes, seconds, milliseconds, microseconds.
        found = _LOADED.search(log)
        if found is None:
            return {}
        minutes, seconds, milliseconds = map(int, found.groups())
        return {"start.model": 60 * minutes + seconds + milliseconds / 1e3}

    def cache_tokens(self) -> int | None:
        props = self.says.object("/props")
        context = (props.get("default_generation_settings") or {}).get("n_ctx")
        slots = props.get("total_slots")
        return context * slots if isinstance(context, int) and isinstance(slots, int) else None
