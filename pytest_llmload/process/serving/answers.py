"""One streamed answer, what is wrong with one, and what an endpoint says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_llmload.core.results import Problem

#: Pieces that come in fewer reads than this share of them came in lumps: their moments are those of the lumps.
_LUMPED = 0.5
#: Share of an answer's time without a processor from which the client, not the server, made the lumps.
_STARVED = 0.25


class BadAnswer(Exception):
    """The endpoint answered, but not as it should have."""

    def __init__(self, check: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(check, message, hint=hint)


class CutOff(BadAnswer):
    """A stream ended in good order, but its answer did not: no event had a finish_reason."""

    def __init__(self, message: str) -> None:
        super().__init__("stream", message)


@dataclass
class Answer:
    """One streamed answer. Moments are ``time.perf_counter``'s."""

    sent: float
    #: When the bytes of each piece of text were read: a piece may be several tokens, and a token no text.
    stamps: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    #: When the event was read that says why the answer ended; the last token was there by then.
    finished: float = 0.0
    ended: float = 0.0
    #: ``length``, ``stop`` …, as the endpoint says it; empty where it has not.
    finish: str = ""
    #: The model, as the answer names it; empty where it does not.
    model: str = ""
    #: Tokens as the endpoint counts them; None where it does not.
    tokens: int | None = None
    prompt_tokens: int | None = None
    #: Token ids, where the protocol tells them, and how many of them the first read brought.
    ids: list[int] = field(default_factory=list)
    first_ids: int = 0
    #: Seconds that the reading thread was ready to run and had no processor.
    starved: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def seconds(self) -> float:
        """Seconds from the request to the end of the answer."""
        return self.ended - self.sent

    @property
    def reads(self) -> int:
        """How many reads of the connection brought text."""
        return len(set(self.stamps))

    @property
    def lumps(self) -> str:
        """Why the moments of its pieces are not those of its tokens; empty where they are."""
        if len(self.pieces) < 2 or self.reads >= max(2.0, _LUMPED * len(self.pieces)):
            return ""
        came = f"{len(self.pieces)} pieces of text came in {self.reads} read{'s' * (self.reads != 1)}"
        if self.starved > _STARVED * self.seconds:
            return f"{came}, since this client waited {self.starved:.2g} of {self.seconds:.2g} s for a processor"
        return f"{came}: the server, or a proxy before it, keeps them back (nginx: proxy_buffering off)"

    def add(self, moment: float, piece: str) -> None:
        self.stamps.append(moment)
        self.pieces.append(piece)

    def check(self, path: str) -> None:
        """Raise BadAnswer where no token was generated."""
        if self.tokens == 0 or (self.tokens is None and not self.stamps):
            raise BadAnswer("tokens", f"{path} streamed no token at all")


@dataclass(frozen=True)
class About:
    """What an endpoint says of itself."""

    #: Models that it lists; None where it does not list any.
    models: tuple[str, ...] | None = None
    #: ``vllm 0.32.0``; empty where it is not known.
    server: str = ""
    #: Tokens that its key-value cache holds; None where it does not say.
    cache_tokens: int | None = None
    #: Commit of the model.
    revision: str = ""
