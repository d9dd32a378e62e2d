"""Tests that hold for every way of loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llmload import LLM, MemoryBaseline


@pytest.mark.llmload(suite=True)
def test_memory(llm: LLM, memory_baseline: MemoryBaseline) -> None:
    """Check that the strategy took effect, and compare memory, manifest and numbers with the baseline."""
    memory_baseline.check(llm)


@pytest.mark.llmload(suite=True)
def test_generates(llm: LLM) -> None:
    """Check that the loaded model generates as many tokens as requested."""
    count = llm.generate("Hello", max_new_tokens=8).count
    if count is None:
        pytest.skip("the endpoint does not report how many tokens it generated")
    assert count == 8
