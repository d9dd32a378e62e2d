"""Prompts of the workload's length, made of words, since an endpoint takes text; the tokenizer counts them if known."""

from __future__ import annotations

import os
import re
from typing import Any

#: Common words; most tokenizers have each as one token.
_WORDS = re.findall(
    r"\w+",
    """
    the of and to in is that for it as was with be by on not he this are or his from at which but have an had they you
    were their one all we can her has there been if more when will would who so no time people year way day man thing
    world life hand part child eye woman place work week case point government company number group problem fact
    """,
)
#: What fills the last tokens where a word is too long.
_FILLERS = (*"etaoinshrdlu.,0123456789",)


class Prompts:
    """Texts of ``length`` tokens, each with a different beginning, so that the server cannot use a prefix cache."""

    def __init__(self, length: int, tokenizer: Any, *, salted: bool) -> None:
        """Make prompts; if ``salted``, they differ in every run, for an endpoint that may have cached the last one."""
        self._length = length
        self._tokenizer = tokenizer
        self._salt = int.from_bytes(os.urandom(4), "big") if salted else 0
        self._made = 0

    def next(self) -> str:
        """Return a prompt that no earlier call has returned."""
        number = self._salt + self._made
        self._made += 1
        beginning = []
        for _ in range(4):
            number, place = divmod(number, len(_WORDS))
            beginning.append(_WORDS[place])
        return self._of_length(beginning)

    def count(self, text: str) -> int | None:
        """Return the number of a prompt's tokens as an endpoint counts them, with a BOS; None without a tokenizer."""
        return self._tokens(text) if self._tokenizer is not None else None

    def ids(self, text: str) -> list[int] | None:
        """Return the ids of a generated text, which has no BOS; None without a tokenizer."""
        if self._tokenizer is None:
            return None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _of_length(self, beginning: list[str]) -> str:
        if self._tokenizer is None:
            return _words(beginning, self._length)
        # Most of the text is added at once and the rest word by word, since counting takes the time.
        count = max(1, self._length * len(_WORDS) * 9 // (10 * self._tokens(" ".join(_WORDS))))
        while count > 1 and self._tokens(_words(beginning, count)) > self._length:
            count = count * 9 // 10
        text = _words(beginning, count)
        for turn in range(self._length):
            have = self._tokens(text)
            fitting = (f" {_WORDS[turn % len(_WORDS)]}", *_FILLERS)
            piece = next((piece for piece in fitting if have < self._tokens(text + piece) <= self._length), None)
            if piece is None:
                break
            text += piece
        return text

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer(text)["input_ids"])


def _words(beginning: list[str], count: int) -> str:
    return " ".join((beginning + _WORDS * (count // len(_WORDS) + 1))[:count])
