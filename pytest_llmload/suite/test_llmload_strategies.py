"""What holds for every way of loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llmload import LLM, MemoryBaseline


@pytest.mark.llmload(suite=True)
def test_memory(llm: LLM, memory_baseline: MemoryBaseline) -> None:
    """The strategy took effect, and memory, manifest and numbers are those of the baseline."""
    memory_baseline.check(llm)


@pytest.mark.llmload(suite=True)
def test_generates(llm: LLM) -> None:
    """The model that was loaded generates as many tokens as it is asked for."""
    assert len(llm.generate("Hello", max_new_tokens=8).tokens) == 8
