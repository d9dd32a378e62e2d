"""vLLM's OpenAI-compatible server."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pytest_llmload.process.serving.servers.base import SelfDescription
from pytest_llmload.process.serving.servers.openai import OpenAi, ignoring_the_end, plain

_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def _with_ids(new_tokens: int) -> dict[str, Any]:
    return {**ignoring_the_end(new_tokens), "return_token_ids": True}


class Vllm(OpenAi):
    name = "vLLM"
    exact_tokens = "`ignore_eos`, `min_tokens`"
    token_count = "`usage` of the stream"
    token_ids = "`return_token_ids`"
    model_id = "`/v1/models`: `--served-model-name`, else the path or id that it was started with"
    version = "`/version`"
    capacity = "`/metrics`: `vllm:cache_config_info`, its `kv_cache_size_tokens` or blocks times block size"
    concurrency = "up to `--max-num-seqs` (by default hundreds)"
    lists_what_it_serves = True
    fields = (_with_ids, ignoring_the_end, plain)
    stops_early = "prompt and new tokens must fit into --max-model-len"
    log_phases: ClassVar[dict[str, str]] = {
        "start.weights": r"Loading weights took ([\d.]+) s",
        "start.model": r"Model loading took .*?([\d.]+) s",
        "start.engine": r"init engine \(.*?\) took ([\d.]+) s",
    }

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return "vllm" in says.owners

    def server(self) -> str:
        return f"vllm {super().server()}".strip()

    def cache_tokens(self) -> int | None:
        metrics = self.says.get("/metrics")
        found = _CACHE.findall(metrics.body) if metrics.status == 200 else []
        total = 0
        # One line for each engine.
        for labels in (dict(_LABEL.findall(text)) for text in found):
            size, blocks, block = (
                labels.get(name, "") for name in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size")
            )
            if size.isdecimal():
                total += int(size)
            elif blocks.isdecimal() and block.isdecimal():
                total += int(blocks) * int(block)
            else:
                return None
        return total or None
