"""Models that cannot be loaded: one clear sentence each, and failure or error as the table of verdicts says."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from pytest_llmload.core.presets import PRESETS
from pytest_llmload.worker.checkpoints.resolve import resolve

TEST = "def test_a(llm): pass"


@pytest.fixture
def model(tmp_path: Path, checkpoint_cache: Path) -> Path:
    """A copy of a small checkpoint, to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(resolve("random:tiny-llama", checkpoint_cache).path, copy)
    return copy


def run(project: Callable[..., pytest.RunResult], model: Path | str) -> pytest.RunResult:
    return project(f"--llm-model=broken={model}", "--llm-device=cpu", "--llm-workload=1x8+3", fast=False)


def test_a_truncated_file_is_a_failure_that_names_it(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], model: Path
) -> None:
    pytester.makepyfile(TEST)
    weights = next(model.glob("*.safetensors"))
    with weights.open("rb+") as file:
        file.truncate(weights.stat().st_size - 4096)
    result = run(project, model)
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert weights.name in text
    assert "the load failed: broken / none" in text
    assert "Traceback" not in text


def test_a_corrupt_file_is_a_failure_that_names_it(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], model: Path
) -> None:
    pytester.makepyfile(TEST)
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    result = run(project, model)
    result.assert_outcomes(failed=1)
    assert weights.name in result.stdout.str()


def test_a_folder_that_is_no_model_is_a_failure_and_a_hub_without_network_an_error(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(TEST)
    (model / "config.json").unlink()
    result = run(project, model)
    assert "config.json" in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
    with socket.socket() as closed:
        # A port that no process listens on.
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(pytester.path / "hub"))
        monkeypatch.setenv("HF_TOKEN", "hf_thisIsAVerySecretToken")
        result = run(project, "org/nothing-like-it")
    result.assert_outcomes(errors=2)
    assert "org/nothing-like-it" in result.stdout.str()
    assert "VerySecret" not in result.stdout.str()
    assert "Traceback" not in result.stdout.str()


@pytest.mark.skipif(version("transformers").startswith("4."), reason="transformers 5 fuses experts")
def test_the_experts_of_a_mixture_stay_dense_and_the_failure_says_so(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """The story that this plugin was born from, with today's libraries."""
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.quant("nf4")
        def test_experts(llm): pass
        @pytest.mark.quant("nf4", dense_ok=["*.experts.*"])
        def test_accepted(llm):
            head = [row for row in llm.manifest if row.module == "lm_head"]
            assert head and not head[0].quant
        """
    )
    result = project("--llm-model=random:tiny-mixtral", "--llm-device=cpu", "--llm-workload=1x8+3", fast=False)
    result.assert_outcomes(failed=1, passed=1)
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if line.startswith("____"))
    text = "\n".join(lines[start + 1 : start + 5])
    assert "nf4 was not applied: tiny-mixtral / nf4" in text
    assert "experts" in text
    assert "%" in text


def test_building_a_random_model_has_the_time_of_a_load(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(TEST)
    # Two gigabytes of embeddings.
    large = {**PRESETS["tiny-llama"], "vocab_size": 1 << 22}
    (pytester.path / "large.json").write_text(json.dumps(large))
    result = project(
        "--llm-model=random:large.json",
        "--llm-device=cpu",
        "--llm-timeout=2s",
        f"--llmload-cache-dir={pytester.path / 'cache'}",
        fast=False,
    )
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["preparing *large.json*: still in phase 'resolve' after 2 s*"])
    assert not [path for path in (pytester.path / "cache").rglob("*") if not path.name.startswith(".")]
