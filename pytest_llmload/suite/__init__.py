"""The ready-made suite: it loads, verifies, measures and gates every strategy that works without further input.

``pytest --pyargs pytest_llmload.suite --llm-model=org/model`` runs it directly. To commit it, write
``from pytest_llmload.suite import *`` in one of your test files: test ids are then stable, and your ``conftest.py``
applies.
"""

from pytest_llmload.suite.test_llmload_strategies import test_generates, test_memory

__all__ = ["test_generates", "test_memory"]
