"""A function of each step's logits, as ``generate()`` takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class LogitsProcessor:
    """Hands the logits of each step, batch x vocabulary, to a function; the step goes on with what that returns.

    transformers reads the signature of the processor's ``__call__`` at each step
    (generation/logits_process.py, ``LogitsProcessorList``), which takes 0.4 ms if the processor is a function.
    """

    def __init__(self, process: Callable[[Any], Any]) -> None:
        self._process = process

    def __call__(self, sequences: Any, logits: Any) -> Any:
        return self._process(logits)
