"""Tensors as a problem names them: each with its bytes, and how many bytes they are together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pytest_llmload.core.units import counted, format_bytes, plural
from pytest_llmload.worker.model.quantisable import Weight
from pytest_llmload.worker.model.tensors import Held


def named(found: Iterable[Held | Weight]) -> tuple[str, ...]:
    """Return the tensors' names with sizes: ``model.layers.0.mlp.up_proj.weight (12.00 MiB)``."""
    return tuple(f"{_name(item)} ({format_bytes(item.nbytes)})" for item in found)


def size_of(found: Iterable[Held | Weight]) -> int:
    """Return the size of tensors in bytes, by their elements."""
    return sum(item.nbytes for item in found)


def sized(found: Sequence[Held | Weight], one: str) -> str:
    """Return how many tensors there are, called ``one`` each, with their size: ``3 weights (12.00 MiB)``."""
    return f"{counted(len(found), one)} ({format_bytes(size_of(found))})"


def dense_weights(found: Sequence[Held | Weight]) -> str:
    """Return that these weights are dense: ``3 weights (12.00 MiB) are dense``."""
    return f"{sized(found, 'weight')} {plural(len(found), 'is', 'are')} dense"


def _name(item: Held | Weight) -> str:
    return item.name if isinstance(item, Weight) else item.path
