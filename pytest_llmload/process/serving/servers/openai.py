"""OpenAI's API: the base of all servers that speak it, and the kind of a server that is not recognised otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from pytest_llmload.process.serving import streams
from pytest_llmload.process.serving.answers import About, Answer, BadAnswer
from pytest_llmload.process.serving.http import Endpoint, Reply
from pytest_llmload.process.serving.servers.base import REFUSED_KEY, SelfDescription, ServerKind
from pytest_llmload.worker.model.prompts import Prompt

#: Statuses of an answer that refuses the fields or the path; any other error status is reported.
_NOT_SO = (400, 404, 405, 422, 501)
#: Fields of a delta that are not text.
_NO_TEXT = ("role",)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_PATHS = {"chat": (CHAT,), "completions": (COMPLETIONS,)}

Fields = Callable[[int], dict[str, Any]]


class RequestRefused(BadAnswer):
    """The endpoint refused every form of the request that was tried."""

    def __init__(self, message: str, status: int, hint: str = "") -> None:
        super().__init__("answers", message, hint)
        self.status = status

    @property
    def for_its_key(self) -> bool:
        """Return true if the endpoint refused the key."""
        return self.status in REFUSED_KEY


def plain(new_tokens: int) -> dict[str, Any]:
    """Return the fields that every server supports."""
    return {"max_tokens": new_tokens, "temperature": 0, "stream_options": {"include_usage": True}}


def ignoring_the_end(new_tokens: int) -> dict[str, Any]:
    """Return the fields that make vLLM, SGLang and llama-server continue after the end of the sequence."""
    return {**plain(new_tokens), "ignore_eos": True, "min_tokens": new_tokens}


class OpenAi(ServerKind):
    """Uses ``/v1/completions`` if it exists, since it adds nothing to a prompt; else ``/v1/chat/completions``."""

    name = "any other OpenAI-compatible server"
    exact_tokens = "`ignore_eos`, `min_tokens`; without them where it refuses them"
    token_count = "`usage` of the stream, else by tokenising the text here"
    model_id = "`/v1/models`, or its answer to a request for the model"
    version = "`/version`, where it has one"
    concurrency = "as it does"
    #: The fields that are tried in turn until the server accepts a request; then only the accepted ones are sent.
    fields: ClassVar[tuple[Fields, ...]] = (ignoring_the_end, plain)
    paths: ClassVar[tuple[str, ...]] = (COMPLETIONS, CHAT)

    def __init__(self, endpoint: Endpoint, says: SelfDescription, api: str = "") -> None:
        super().__init__(endpoint, says, api)
        self._is_named = api in _PATHS
        self._has_answered = False
        self._ways = [(path, way) for path in _PATHS.get(api, self.paths) for way in type(self).fields]

    @classmethod
    def recognises(cls, says: SelfDescription) -> bool:
        return True

    @property
    def chat(self) -> bool:  # type: ignore[override]
        return self._ways[0][0] == CHAT

    def about(self) -> About:
        rows = self.says.models
        models = None if rows is None else tuple(str(row["id"]) for row in rows)
        return About(models, self.server(), self.cache_tokens())

    def server(self) -> str:
        """Return its name and version as far as it reports them."""
        version = self.says.object("/version").get("version", "")
        return str(version) if isinstance(version, str) else ""

    def cache_tokens(self) -> int | None:
        """Return the number of tokens that its key-value cache holds; None if it does not report it."""
        return None

    def answer(self, prompt: Prompt, new_tokens: int) -> Answer:
        refusals: list[str] = []
        status = 0
        for path, fields in list(self._ways):
            body = {"model": self.model, "stream": True, **_what(path, prompt), **fields(new_tokens)}
            try:
                answer = streams.read(self.endpoint, path, body, take)
            except streams.Refusal as refusal:
                refusals += [str(refusal)] if str(refusal) not in refusals else []
                # The refusal of the first path is reported; the others are only fallbacks.
                status = status or refusal.status
                if refusal.status not in _NOT_SO:
                    status = refusal.status
                    break
                continue
            self._has_answered = True
            self._settle(path, fields)
            answer.prompt = prompt
            # Only an answer without a count and without text is asked about: that may take requests of its own.
            unknown = answer.tokens is None and not answer.stamps
            answer.check(f"POST {path}", self.told_tokens(answer, new_tokens) if unknown else None)
            return answer
        is_long = self._has_answered and status == 400
        hint = f"it has answered shorter requests: {self.stops_early}" if is_long else ""
        raise RequestRefused("; ".join(refusals), status, hint)

    def answers_to(self, model: str) -> bool:
        return self._unstreamed(model, "a", 1).status == 200

    def _unstreamed(self, model: str, prompt: Prompt, new_tokens: int) -> Reply:
        """Return the answer to a request as :meth:`answer` sends it, but not as a stream."""
        path, fields = self._ways[0]
        rest = {name: value for name, value in fields(new_tokens).items() if name != "stream_options"}
        return self.endpoint.post(path, {"model": model, **_what(path, prompt), **rest})

    def _settle(self, path: str, fields: Fields) -> None:
        if len(self._ways) == 1:
            return
        self._ways = [(path, fields)]
        if path == CHAT and COMPLETIONS in self.paths and not self._is_named:
            self.notes.append("there is no /v1/completions: the prompt went through the chat template")
        if fields is plain:
            self.notes.append("the endpoint has no option to continue after the end of the sequence")


def _what(path: str, prompt: Prompt) -> dict[str, Any]:
    if path != CHAT:
        return {"prompt": prompt}
    return {"messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}


def take(answer: Answer, moment: float, event: dict[str, Any]) -> None:
    """Read one event of a stream into the answer."""
    if isinstance(event.get("model"), str):
        answer.model = event["model"]
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.tokens, answer.prompt_tokens = usage.get("completion_tokens"), usage.get("prompt_tokens")
    for choice in event.get("choices") or ():
        if ids := choice.get("token_ids"):
            if not answer.stamps or moment == answer.stamps[0]:
                answer.first_ids += len(ids)
            answer.ids += ids
        piece = choice.get("text") or "".join(_texts(choice.get("delta") or {}))
        if piece:
            answer.add(moment, piece)
        answer.finish = choice.get("finish_reason") or answer.finish


def _texts(delta: dict[str, Any]) -> list[str]:
    """Return the text of a delta of any kind: an answer, reasoning by whichever name, a refusal, a call's arguments."""
    found = [value for name, value in delta.items() if isinstance(value, str) and name not in _NO_TEXT]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        found += [function[name] for name in ("name", "arguments") if isinstance(function.get(name), str)]
    return list(dict.fromkeys(found))
