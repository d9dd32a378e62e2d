"""Tensors as a problem names them: each with its bytes, and how many bytes they are together."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.model.quantisable import Weight
from pytest_llmload.worker.model.tensors import Held


def named(found: Iterable[Held | Weight]) -> tuple[str, ...]:
    """Return the tensors' names with sizes: ``model.layers.0.mlp.up_proj.weight (12.00 MiB)``."""
    return tuple(f"{_name(item)} ({format_bytes(item.nbytes)})" for item in found)


def size_of(found: Iterable[Held | Weight]) -> int:
    """Return the size of tensors in bytes, by their elements."""
    return sum(item.nbytes for item in found)


def _name(item: Held | Weight) -> str:
    return item.name if isinstance(item, Weight) else item.path
