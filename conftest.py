"""What all tests of the project share; their fixtures live in ``tests/``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator

import pytest

from pytest_llmload.system.garbage import collected_rarely

pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    """Set what every process of a run gets: one folder for the checkpoints that they build, and one thread each.

    Small matrices gain nothing from threads, and lose most of their time to them where processes share the cores.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    if "LLMLOAD_TEST_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="llmload-test-")
        os.environ["LLMLOAD_TEST_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect garbage less often while the tests are imported, and torch and transformers with them."""
    with collected_rarely():
        return (yield)
