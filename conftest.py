"""What all tests of the project share; their fixtures live in ``tests/``."""

from __future__ import annotations

import os
import tempfile

import pytest

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Have all workers of a run keep the checkpoints that they build in one folder: each is built once."""
    if "LLMLOAD_TEST_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="llmload-test-")
        os.environ["LLMLOAD_TEST_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)
