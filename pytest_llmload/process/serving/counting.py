"""Count the tokens of an answer, and those that came with its first read. Every time per token uses this count."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.servers.base import ServerKind

#: The largest ratio between the requested tokens and those of the answer's text when it is tokenised, or vice versa:
#: pieces of words may join, special tokens have no text, and bytes that are not text become several tokens.
_MOST = 2.0


@dataclass(frozen=True)
class Count:
    """The tokens of an answer."""

    tokens: int
    #: How they were counted, for a note; empty if the endpoint counts them.
    by: str = ""


def count(kind: ServerKind, prompts: Prompts, answer: Answer, new_tokens: int) -> Count | None:
    """Return the token count of an answer to a request for ``new_tokens``; None if it cannot be determined."""
    if answer.tokens is not None:
        return Count(answer.tokens)
    if answer.ids:
        return Count(len(answer.ids))
    told = kind.told_tokens(answer, new_tokens)
    if told is not None and kind.told_by:
        return Count(told, kind.told_by)
    ids = prompts.ids(answer.text)
    if ids is None:
        return None
    if told is not None and told <= _MOST * len(ids) and len(ids) <= _MOST * told:
        return Count(told, "by the request, whose limit was reached, and compared with the text tokenised here")
    return Count(len(ids), "by tokenising the text here")


def in_first_read(prompts: Prompts, answer: Answer) -> int:
    """Return the number of tokens that came with the first text; at least one."""
    if answer.ids:
        return max(answer.first_ids, 1)
    first = [piece for piece, stamp in zip(answer.pieces, answer.stamps, strict=True) if stamp == answer.stamps[0]]
    ids = prompts.ids("".join(first))
    return max(len(ids) if ids is not None else len(first), 1)


def per_token(prompts: Prompts, answer: Answer, tokens: int) -> float | None:
    """Return the seconds of each token after the first read; None if all came with it."""
    if answer.reads < 2:
        return None
    further = tokens - in_first_read(prompts, answer)
    return (max(answer.finished, answer.stamps[-1]) - answer.stamps[0]) / further if further > 0 else None
