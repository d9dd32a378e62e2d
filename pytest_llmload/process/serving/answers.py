"""One streamed answer, the errors of an answer, and what an endpoint reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted
from pytest_llmload.worker.model.prompts import Prompt

#: If pieces come in fewer reads than this share of their number, they came in lumps, and their times are the lumps'.
_LUMPED = 0.5
#: If the client waited for a processor for this share of an answer's time, the client caused the lumps.
_STARVED = 0.25


class BadAnswer(Exception):
    """The endpoint answered, but not as it should have."""

    def __init__(self, check: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(check, message, hint=hint)


class CutOff(BadAnswer):
    """A stream ended properly, but its answer did not: no event had a finish_reason."""

    def __init__(self, message: str) -> None:
        super().__init__("stream", message)


@dataclass
class Answer:
    """One streamed answer. Times are those of ``time.perf_counter``, in seconds."""

    #: When the request was sent, after the connection was made.
    sent: float
    #: When the bytes of each piece of text were read. A piece may be several tokens, and a token may have no text.
    stamps: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    #: When the event was read that says why the answer ended; the last token had arrived by then.
    finished: float = 0.0
    ended: float = 0.0
    #: Why the answer ended (``length``, ``stop`` …), as the endpoint reports it; empty if it does not.
    finish: str = ""
    #: What was asked.
    prompt: Prompt = ""
    #: The model that the answer names; empty if it names none.
    model: str = ""
    #: The number of tokens as the endpoint counts them; None if it does not.
    tokens: int | None = None
    prompt_tokens: int | None = None
    #: Token ids, if the protocol reports them, and how many of them came with the first read.
    ids: list[int] = field(default_factory=list)
    first_ids: int = 0
    #: Seconds that the reading thread was ready to run and waited for a processor.
    starved: float = 0.0

    @property
    def text(self) -> str:
        """Return the whole text."""
        return "".join(self.pieces)

    @property
    def seconds(self) -> float:
        """Return the seconds from the request to the end of the answer."""
        return self.ended - self.sent

    @property
    def reads(self) -> int:
        """Return the number of reads of the connection that brought text."""
        return len(set(self.stamps))

    @property
    def is_starved(self) -> bool:
        """Return true if the client waited for a processor for so long that its times are those of the waits."""
        return self.starved > _STARVED * self.seconds

    @property
    def lumps(self) -> str:
        """Return why the times of its pieces are not those of its tokens; empty if they are."""
        if len(self.pieces) < 2 or self.reads >= max(2.0, _LUMPED * len(self.pieces)):
            return ""
        came = f"{len(self.pieces)} pieces of text came in {counted(self.reads, 'read')}"
        if self.is_starved:
            return f"{came}, since this client waited {self.starved:.2g} of {self.seconds:.2g} s for a processor"
        return f"{came}: the server, or a proxy in front of it, buffers them (nginx: set proxy_buffering off)"

    def add(self, moment: float, piece: str) -> None:
        """Add a piece of text that arrived at a moment of the monotonic clock, in seconds."""
        self.stamps.append(moment)
        self.pieces.append(piece)

    def check(self, path: str, told: int | None) -> None:
        """Raise BadAnswer if no token was generated; ``told`` is their number as the reason of its end tells it.

        An answer may have tokens and no text: a part of a character, or special tokens only.
        """
        generated = told if self.tokens is None else self.tokens
        if generated == 0 or (generated is None and not self.stamps):
            raise BadAnswer("tokens", f"{path} streamed no token at all")


@dataclass(frozen=True)
class About:
    """What an endpoint reports about itself."""

    #: Models that it lists; None if it has no list.
    models: tuple[str, ...] | None = None
    #: The server's name and version, like ``vllm 0.32.0``; empty if unknown.
    server: str = ""
    #: The number of tokens that its key-value cache holds; None if it does not report it.
    cache_tokens: int | None = None
    #: The commit of the model; empty if unknown.
    revision: str = ""
