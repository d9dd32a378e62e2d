"""A user's project to run the plugin in, as a user would: by the command line, in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the checkpoints that one module of tests builds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let torch use one thread: tiny matrices are slower in several."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
