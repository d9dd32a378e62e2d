"""The helper for users' own strategies, in a user's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def test_load_once_gives_the_result_and_raises_what_the_load_raised(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], checkpoint_cache: Path
) -> None:
    pytester.makepyfile(
        dies="import os, signal\nprint('the last words')\nos.kill(os.getpid(), signal.SIGKILL)\n",
        test_it=f"""
        import pytest
        from pytest_llmload import LoadCrashed, LoadFailed
        from pytest_llmload.testing import load_once
        CACHE = {str(checkpoint_cache)!r}

        def test_result():
            result = load_once(quant="int8", cache_dir=CACHE)
            assert result.ok
            assert {{row.cls for row in result.manifest}} >= {{"Linear8bitLt"}}
        def test_raised():
            with pytest.raises(LoadFailed, match="unknown strategy 'awq'; use one of "):
                load_once(strategy="awq", cache_dir=CACHE)
        def test_death():
            with pytest.raises(LoadCrashed, match=r"(?s)killed by SIGKILL in phase 'import'.*the last words"):
                load_once(imports=("dies",), cache_dir=CACHE)
        """,
    )
    # Each call has a process of its own for its load, and one for the model's files.
    project(fast=False, servers=6).assert_outcomes(passed=3)
