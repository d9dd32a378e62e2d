"""Endpoints that speak OpenAI's API: transformers' server, vLLM, SGLang and others, each with additions of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pytest_llmload.process.serving import streams
from pytest_llmload.process.serving.api import About, Answer, Api, BadAnswer
from pytest_llmload.process.serving.http import Endpoint, Reply

#: Answers that say "not with these fields" or "not this path"; others are the finding itself.
_NOT_SO = (400, 404, 405, 422, 501)
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Fields = Callable[[int], dict[str, Any]]


def _ignoring_the_end(new_tokens: int) -> dict[str, Any]:
    """As vLLM and SGLang take it."""
    return {**_plain(new_tokens), "ignore_eos": True, "min_tokens": new_tokens}


def _plain(new_tokens: int) -> dict[str, Any]:
    return {"max_tokens": new_tokens, "temperature": 0, "stream_options": {"include_usage": True}}


def _transformers(new_tokens: int) -> dict[str, Any]:
    """transformers' server refuses fields that it does not know, takes a whole generation config, and counts always."""
    config = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return {"generation_config": json.dumps(config)}


class OpenAI(Api):
    """``/v1/completions`` where there is one, since it adds nothing to a prompt; else ``/v1/chat/completions``."""

    def __init__(self, endpoint: Endpoint, *, transformers: bool = False) -> None:
        super().__init__(endpoint)
        self._transformers = transformers
        fields: tuple[Fields, ...] = (_transformers, _plain) if transformers else (_ignoring_the_end, _plain)
        #: What is tried in turn until a request is accepted; then only that one.
        self._ways = [(path, way) for path in ("/v1/completions", "/v1/chat/completions") for way in fields]

    @property
    def chat(self) -> bool:
        """Whether a chat template stands around the prompt."""
        return "chat" in self._ways[0][0]

    @property
    def as_told(self) -> bool:
        """Whether the server generates by settings that are all ours: transformers' own, without a chat template."""
        return self._ways == [("/v1/completions", _transformers)]

    def about(self) -> About:
        # Of transformers' server this is the list of the hub's cache, which says nothing of what is served.
        models = None if self._transformers else _models(self.endpoint.get("/v1/models"))
        version = self.endpoint.get("/version").json()
        metrics = self.endpoint.get("/metrics")
        found = _CACHE.findall(metrics.body) if metrics.status == 200 else []
        name = "transformers serve" if self._transformers else "vllm" if found else ""
        number = version.get("version", "") if isinstance(version, dict) else ""
        return About(models, f"{name} {number}".strip(), _cache_tokens(found))

    def answer(self, prompt: str, new_tokens: int) -> Answer:
        refusals: list[str] = []
        for path, fields in list(self._ways):
            what = {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}
            body = {"model": self.model, "stream": True, **what, **fields(new_tokens)}
            try:
                answer = streams.read(self.endpoint, path, body, _take)
            except streams.Refusal as refusal:
                refusals += [str(refusal)] if str(refusal) not in refusals else []
                if refusal.status not in _NOT_SO:
                    break
                continue
            self._settle(path, fields)
            return answer
        raise BadAnswer("answers", "; ".join(refusals))

    def answers_to(self, model: str) -> bool:
        path, fields = self._ways[0]
        what = {"messages": [{"role": "user", "content": "a"}]} if self.chat else {"prompt": "a"}
        rest = {name: value for name, value in fields(1).items() if name != "stream_options"}
        return self.endpoint.post(path, {"model": model, **what, **rest}).status == 200

    def _settle(self, path: str, fields: Fields) -> None:
        if len(self._ways) == 1:
            return
        self._ways = [(path, fields)]
        if "chat" in path:
            self.notes.append("there is no /v1/completions: the prompt went through the chat template")
        if fields is _plain:
            self.notes.append("the endpoint cannot be told to go on after the end of the sequence")


def _take(answer: Answer, moment: float, event: dict[str, Any]) -> bool:
    if isinstance(event.get("model"), str):
        answer.model = event["model"]
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.tokens, answer.prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
    ended = False
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        piece = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
        if piece:
            answer.add(moment, piece)
        ended = ended or choice.get("finish_reason") is not None
    return ended


def _models(reply: Reply) -> tuple[str, ...] | None:
    rows = (reply.json() or {}).get("data") if reply.status == 200 and isinstance(reply.json(), dict) else None
    if not isinstance(rows, list):
        return None
    return tuple(str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row)


def _cache_tokens(found: list[str]) -> int | None:
    """Tokens of all engines' key-value caches, by the labels of vLLM's ``cache_config_info``."""
    total = 0
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
