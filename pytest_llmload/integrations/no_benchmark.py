"""``llm_benchmark`` where pytest-benchmark is not installed or switched off."""

from __future__ import annotations

from typing import NoReturn

import pytest


@pytest.fixture
def llm_benchmark() -> NoReturn:
    """Skips: llm_benchmark needs pytest-benchmark."""
    pytest.skip("llm_benchmark needs pytest-benchmark: pip install 'pytest-llmload[benchmark]'")
