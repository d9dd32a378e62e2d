"""What each kind of model server declares, and what an endpoint says of itself."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from pytest_llmload.process.serving.answers import About, Answer
from pytest_llmload.process.serving.http import Endpoint, HungUp, Late, Reply
from pytest_llmload.worker.model.prompts import Prompt

#: Seconds that one answer about the server itself may take.
PATIENCE = 5.0
_NO_REPLY = Reply(0, "")


class SelfDescription:
    """What an endpoint answers to GET requests, each asked once."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._replies: dict[str, Reply] = {}

    def get(self, path: str) -> Reply:
        """Return the answer; one of status 0, whose body is the reason, where it hung up or was late.

        Raise Unreachable.
        """
        if path not in self._replies:
            try:
                self._replies[path] = self.endpoint.get(path, PATIENCE)
            except (HungUp, Late) as error:
                self._replies[path] = Reply(0, str(error))
        return self._replies[path]

    def object(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path; an empty one where there is none."""
        reply = self.get(path)
        value = reply.json() if reply.status == 200 else None
        return value if isinstance(value, dict) else {}

    @property
    def models(self) -> list[dict[str, Any]] | None:
        """The rows of ``/v1/models``; None where the endpoint does not list any."""
        rows = self.object("/v1/models").get("data")
        return [row for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else None

    @property
    def owners(self) -> set[str]:
        """Who owns the models that are listed, which for some servers is the server's name."""
        return {str(row.get("owned_by", "")) for row in self.models or ()}

    def header(self, name: str) -> str:
        """Return a header of the answer to ``/v1/models``, whatever its status; empty where there is none."""
        return self.get("/v1/models").headers.get(name, "")


class ServerKind(ABC):
    """One kind of server. The texts make the table in the documentation."""

    name: ClassVar[str]
    #: How it is told to generate exactly as many tokens as a workload has.
    exact_tokens: ClassVar[str]
    #: Where it says how many tokens an answer has.
    token_count: ClassVar[str]
    #: Where it says token ids; empty where it does not.
    token_ids: ClassVar[str] = ""
    #: The path that answers 200 once it can serve, without generating anything.
    health: ClassVar[str] = "/health"
    #: How it says which model it serves.
    model_id: ClassVar[str]
    #: Where it says its version.
    version: ClassVar[str]
    #: Where it says what its key-value cache holds; empty where it does not.
    capacity: ClassVar[str] = ""
    #: What it does with eight requests at once.
    concurrency: ClassVar[str]
    #: Whether its list of models is what it serves, so that a model that is not in it is not served.
    lists_what_it_serves: ClassVar[bool] = False
    #: Whether its answers name the model behind it, not the one that was asked for.
    renames: ClassVar[bool] = False
    #: The cause and the setting where an answer is cut off, and where one stops early.
    cut_off: ClassVar[str] = (
        "some servers end a running answer when another request arrives: llama-cpp-python's does, unless it is started "
        "with --interrupt_requests False"
    )
    stops_early: ClassVar[str] = (
        "it does not heed ignore_eos or min_tokens, or its context is full: prompt and new tokens must fit into it"
    )
    #: Parts of its start, as its log tells them: name of the phase -> a pattern whose group is seconds.
    log_phases: ClassVar[dict[str, str]] = {}
    #: Whether it generates by settings that are all ours, so that its text can be compared with the model's own.
    as_told: bool = False
    #: Whether a chat template stands around the prompt.
    chat: bool = False

    def __init__(self, endpoint: Endpoint, says: SelfDescription, api: str = "") -> None:
        self.endpoint = endpoint
        self.says = says
        #: The model that is asked for.
        self.model = ""
        #: What it had to be asked without, or otherwise.
        self.notes: list[str] = []

    @classmethod
    @abstractmethod
    def recognises(cls, says: SelfDescription) -> bool:
        """Return whether an endpoint is of this kind."""

    @abstractmethod
    def about(self) -> About:
        """Return what the endpoint says of itself."""

    @abstractmethod
    def answer(self, prompt: Prompt, new_tokens: int) -> Answer:
        """Have it continue a text greedily by ``new_tokens``, past the end of the sequence where it can be told so.

        One of :attr:`chat` is given the messages of a chat too.

        Raise ModelRefused, BadAnswer; HungUp where the connection ends before the answer does; Late.
        """

    def unhealthy(self) -> str:
        """Return why it cannot serve yet; empty where it can, or where only a request can tell."""
        reply = self.says.get(self.health)
        if reply.status in (0, 404, 405) and self.says.get("/v1/models").status == 200:
            # It has no such path, or hangs there: the model itself will tell.
            return ""
        return "" if reply.status == 200 else _complaint(self.health, reply)

    def answers_to(self, model: str) -> bool:
        """Return whether it answers when asked for another model; a protocol that names none is not asked."""
        return False

    def told_tokens(self, answer: Answer, new_tokens: int) -> int | None:
        """Return the tokens of an answer that does not count them, where what it says of its end tells; else None."""
        return None

    def phases_of(self, log: str) -> dict[str, float]:
        """Return the seconds of each part of the start that the server's log tells."""
        found = {name: re.findall(pattern, log) for name, pattern in self.log_phases.items()}
        return {name: float(values[-1]) for name, values in found.items() if values}


def _complaint(path: str, reply: Reply) -> str:
    if not reply.status:
        return f"GET {path}: {reply.body}"
    return f"GET {path} answers {reply.status}: {reply.quoted or 'nothing'}"


def complaint(says: SelfDescription, path: str) -> str:
    """Return why a path is not as it should be; empty where it answers 200."""
    reply = says.get(path)
    return "" if reply.status == 200 else _complaint(path, reply)
