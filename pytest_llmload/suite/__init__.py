"""The ready-made suite: every strategy that needs no further input, loaded, proven, measured and gated.

``pytest --pyargs pytest_llmload.suite --llm-model=org/model`` runs it as it is; ``from pytest_llmload.suite import *``
in a test file of your own is the committed form, with stable test ids and your own ``conftest.py``.
"""

from pytest_llmload.suite.test_llmload_strategies import test_generates, test_memory

__all__ = ["test_generates", "test_memory"]
