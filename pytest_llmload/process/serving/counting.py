"""How many tokens an answer has, and which of them its first read brought: no time is divided by another count."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llmload.process.serving.answers import Answer
from pytest_llmload.process.serving.prompts import Prompts
from pytest_llmload.process.serving.servers.base import ServerKind

#: How many times the tokens that a request asked for its text may give when it is tokenised, or the other way round:
#: pieces of words may join, special tokens have no text, and bytes that are no text become several tokens.
_MOST = 2.0


@dataclass(frozen=True)
class Count:
    """The tokens of an answer."""

    tokens: int
    #: How they were counted, for a note; empty where the endpoint counts them.
    by: str = ""


def count(kind: ServerKind, prompts: Prompts, answer: Answer, new_tokens: int) -> Count | None:
    """Return the tokens of an answer to a request for ``new_tokens``; None where they cannot be told."""
    if answer.tokens is not None:
        return Count(answer.tokens)
    if answer.ids:
        return Count(len(answer.ids))
    ids = prompts.ids(answer.text)
    if ids is None:
        return None
    told = kind.told_tokens(answer, new_tokens)
    if told is not None and told <= _MOST * len(ids) and len(ids) <= _MOST * told:
        return Count(told, "by the request, whose limit was reached, and held against the text tokenised here")
    return Count(len(ids), "by tokenising the text here")


def in_first_read(prompts: Prompts, answer: Answer) -> int:
    """Return the tokens that came with the first text; at least one."""
    if answer.ids:
        return max(answer.first_ids, 1)
    first = [piece for piece, stamp in zip(answer.pieces, answer.stamps, strict=True) if stamp == answer.stamps[0]]
    ids = prompts.ids("".join(first))
    return max(len(ids) if ids is not None else len(first), 1)


def per_token(prompts: Prompts, answer: Answer, tokens: int) -> float | None:
    """Return the seconds of each token after the first read; None where all came with it."""
    if answer.reads < 2:
        return None
    further = tokens - in_first_read(prompts, answer)
    return (max(answer.finished, answer.stamps[-1]) - answer.stamps[0]) / further if further > 0 else None
