"""A user's project to run the plugin in, as a user would: by the command line, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

#: Small enough for two cores, and a workload of its own where figures are compared.
MODEL = "--llm-model=random:tiny-llama"
FAST = (MODEL, "--llm-device=cpu", "--llm-workload=1x16+4")


@pytest.fixture(scope="session")
def checkpoint_cache() -> Path:
    """Return the folder in which every run of this session keeps the checkpoints that it builds."""
    return Path(os.environ["LLMLOAD_TEST_CACHE"])


@pytest.fixture
def project(
    pytester: pytest.Pytester, checkpoint_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run pytest in the test's folder; ``fast=True`` (the default) loads tiny-llama on the CPU."""
    for name in ("PYTEST_ADDOPTS", "CI", "COLUMNS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    # Small matrices gain nothing from threads, and lose much where cores are shared.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str, fast: bool = True, cached: bool = True, randomly: bool = False) -> pytest.RunResult:
        options = [*(FAST if fast else ()), *arguments]
        if cached:
            options.append(f"--llmload-cache-dir={checkpoint_cache}")
        # pytest-randomly imports what other packages give it to seed, torch among it: only where a test is about it.
        options += [] if randomly else ["-p", "no:randomly"]
        return pytester.run(sys.executable, "-m", "pytest", *options, timeout=240)

    return run
