"""The helper for users' own strategies."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_llmload import LoadCrashed, LoadFailed
from pytest_llmload.testing import load_once


def test_load_once_gives_the_result_and_raises_what_the_load_raised(checkpoint_cache: Path) -> None:
    result = load_once(quant="int8", cache_dir=checkpoint_cache)
    assert result.ok
    assert {row.cls for row in result.manifest} >= {"Linear8bitLt"}
    with pytest.raises(LoadFailed, match="unknown strategy 'awq'; use one of "):
        load_once(strategy="awq", cache_dir=checkpoint_cache)


def test_load_once_raises_the_public_error_of_a_death(
    checkpoint_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dies.py").write_text(
        "import os, signal\nprint('the last words')\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadCrashed, match=r"(?s)killed by SIGKILL in phase 'import'.*the last words"):
        load_once(imports=("dies",), cache_dir=checkpoint_cache)
