"""Many plugins at once: only in the environment that has them, which ``make test-plugins`` builds."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import pytest

#: Plain ``make test`` has not all of these plugins.
collect_ignore_glob = [] if os.environ.get("LLMLOAD_PLUGINS") else ["test_*.py"]


@pytest.fixture
def project(project: Callable[..., pytest.RunResult]) -> Callable[..., pytest.RunResult]:
    """Return the runs of a user's project, each started as a user's is: coverage sees how a process ends."""
    return partial(project, cold=True)
