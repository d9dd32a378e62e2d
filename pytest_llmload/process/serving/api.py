"""What every kind of endpoint answers, whatever it speaks; and what is wrong where it does not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from pytest_llmload.core.results import Problem
from pytest_llmload.process.serving.http import Endpoint


class BadAnswer(Exception):
    """The endpoint answered, and not what it should have."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(check, message)


@dataclass
class Answer:
    """One streamed answer. Moments are ``time.perf_counter``'s."""

    sent: float
    #: When each piece of text arrived: a piece may be several tokens, and a token no text.
    stamps: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    ended: float = 0.0
    #: The model, as the answer names it; empty where it does not.
    model: str = ""
    #: Tokens as the endpoint counts them; None where it does not.
    tokens: int | None = None
    prompt_tokens: int | None = None
    #: Token ids, where the protocol tells them.
    ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def add(self, moment: float, piece: str) -> None:
        self.stamps.append(moment)
        self.pieces.append(piece)

    def check(self, path: str) -> None:
        """Raise BadAnswer where nothing was generated."""
        if self.tokens == 0 or (self.tokens is None and not self.stamps):
            raise BadAnswer("tokens", f"{path} streamed no token at all")


@dataclass(frozen=True)
class About:
    """What an endpoint says of itself."""

    #: Models that it serves; None where it does not say.
    models: tuple[str, ...] | None = None
    #: ``vllm 0.11.0``; empty where unknown.
    server: str = ""
    #: Tokens that its key-value cache holds; None where it does not say.
    cache_tokens: int | None = None
    #: Commit of the model.
    revision: str = ""


class Api(ABC):
    """One protocol."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        #: The model that is asked for.
        self.model = ""
        #: What it had to be asked without, or otherwise.
        self.notes: list[str] = []

    @abstractmethod
    def about(self) -> About:
        """Ask it about itself."""

    @abstractmethod
    def answer(self, prompt: str, new_tokens: int) -> Answer:
        """Have it continue a text greedily by ``new_tokens``, past the end of the sequence where it can be told so.

        Raises BadAnswer; HungUp where the connection ends before the answer does; Late.
        """

    def answers_to(self, model: str) -> bool:
        """Whether it answers when asked for another model; a protocol that names none does not ask."""
        return False
