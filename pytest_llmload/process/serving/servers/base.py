"""The base class of model servers, and what an endpoint reports about itself."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pytest_llmload.process.serving.answers import About, Answer
from pytest_llmload.process.serving.http import Endpoint, HungUp, Late, Reply
from pytest_llmload.worker.model.prompts import Prompt

#: The most seconds to wait for one answer about the server itself.
PATIENCE = 5.0
#: Statuses with which a server refuses a key.
REFUSED_KEY = (401, 403)


class SelfDescription:
    """An endpoint's answers to GET requests, each of which is sent once."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._replies: dict[str, Reply] = {}

    def get(self, path: str) -> Reply:
        """Return the answer; if the endpoint hung up or was late, one of status 0 whose body is the reason.

        Raises Unreachable.
        """
        if path not in self._replies:
            try:
                self._replies[path] = self.endpoint.get(path, PATIENCE)
            except (HungUp, Late) as error:
                self._replies[path] = Reply(0, str(error))
        return self._replies[path]

    def object(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path; an empty one if there is none."""
        reply = self.get(path)
        value = reply.json() if reply.status == 200 else None
        return value if isinstance(value, dict) else {}

    @property
    def models(self) -> list[dict[str, Any]] | None:
        """Return the rows of ``/v1/models``; None if the endpoint has no list."""
        rows = self.object("/v1/models").get("data")
        return [row for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else None

    @property
    def owners(self) -> set[str]:
        """Return the owners of the listed models, which for some servers are the server's name."""
        return {str(row.get("owned_by", "")) for row in self.models or ()}

    def header(self, name: str) -> str:
        """Return a header of the answer to ``/v1/models``, of any status; empty if there is none."""
        return self.get("/v1/models").headers.get(name, "")


class ServerKind(ABC):
    """One kind of server. The texts are shown in the table of the documentation."""

    name: ClassVar[str]
    #: The fields that make it generate exactly as many tokens as a workload has.
    exact_tokens: ClassVar[str]
    #: Where it reports how many tokens an answer has.
    token_count: ClassVar[str]
    #: How the server counts the tokens of :meth:`told_tokens`, for a note; empty if they are the requested ones.
    told_by: ClassVar[str] = ""
    #: Where it reports token ids; empty if it does not.
    token_ids: ClassVar[str] = ""
    #: The path that answers 200 once it can serve, without generating anything.
    health: ClassVar[str] = "/health"
    #: Where it reports which model it serves.
    model_id: ClassVar[str]
    #: Where it reports its version.
    version: ClassVar[str]
    #: Where it reports the capacity of its key-value cache; empty if it does not.
    capacity: ClassVar[str] = ""
    #: How it handles eight requests at once.
    concurrency: ClassVar[str]
    #: True if it serves exactly the models that it lists.
    lists_what_it_serves: ClassVar[bool] = False
    #: True if its answers name the model behind it instead of the requested one.
    renames: ClassVar[bool] = False
    #: The cause of an answer that is cut off, and of one that stops early, each with the setting that helps.
    cut_off: ClassVar[str] = (
        "some servers end a running answer when another request arrives: llama-cpp-python's does, unless it is started "
        "with --interrupt_requests False"
    )
    stops_early: ClassVar[str] = (
        "it ignores ignore_eos or min_tokens, or its context is full: prompt and new tokens must fit into it"
    )
    #: Parts of its start that its log reports: name of the phase -> a pattern whose group is the seconds.
    log_phases: ClassVar[dict[str, str]] = {}
    #: True if the load chose all its settings, so that its text can be compared with the model's own.
    as_told: bool = False
    #: True if the server puts a chat template around the prompt.
    chat: bool = False

    def __init__(self, endpoint: Endpoint, says: SelfDescription, api: str = "") -> None:
        self.endpoint = endpoint
        self.says = says
        #: The id of the model to request.
        self.model = ""
        #: Notes on how requests had to differ from the intended ones.
        self.notes: list[str] = []

    @classmethod
    @abstractmethod
    def recognises(cls, says: SelfDescription) -> bool:
        """Return true if an endpoint is of this kind."""

    @abstractmethod
    def about(self) -> About:
        """Return what the endpoint reports about itself."""

    @abstractmethod
    def answer(self, prompt: Prompt, new_tokens: int) -> Answer:
        """Request a greedy continuation of ``new_tokens``, past the end of the sequence if the server supports that.

        A kind with :attr:`chat` also accepts the messages of a chat.

        Raises ModelRefused, BadAnswer and Late, and HungUp if the connection ends before the answer does.
        """

    def unhealthy(self) -> str:
        """Return why it cannot serve yet; empty if it can, or if only a request can show it."""
        reply = self.says.get(self.health)
        if reply.status in (0, 404, 405) and self.says.get("/v1/models").status == 200:
            # It has no such path, or hangs there: the first request will show whether it can serve.
            return ""
        return "" if reply.status == 200 else _complaint(self.health, reply)

    def key_is_refused(self, key: str) -> bool:
        """Return true if the endpoint does not list its models with this key, or without one if it is empty."""
        return self.says.get("/v1/models").status in REFUSED_KEY

    def answers_to(self, model: str) -> bool:
        """Return true if it answers a request for a different model; false if the protocol does not name models."""
        return False

    def told_tokens(self, answer: Answer, new_tokens: int) -> int | None:
        """Return the token count of an answer that has none, if something else determines it; else None.

        This may send requests, and must therefore not be called while others are measured.
        """
        return None

    def phases_of(self, log: str) -> dict[str, float]:
        """Return the seconds of each part of the start that the server's log reports."""
        found = {name: re.findall(pattern, log) for name, pattern in self.log_phases.items()}
        return {name: float(values[-1]) for name, values in found.items() if values}


def _complaint(path: str, reply: Reply) -> str:
    if not reply.status:
        return f"GET {path}: {reply.body}"
    return f"GET {path} answers {reply.status}: {reply.quoted or 'nothing'}"


def complaint(says: SelfDescription, path: str) -> str:
    """Return what is wrong with the answer at a path; empty if its status is 200."""
    reply = says.get(path)
    return "" if reply.status == 200 else _complaint(path, reply)
