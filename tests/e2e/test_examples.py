"""What the repository shows to a newcomer runs as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.core.presets import config_of

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "project"


def test_the_readme_shows_the_example_that_is_kept_as_a_file() -> None:
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1] == (EXAMPLE / "test_model.py").read_text(encoding="utf-8")


def test_the_readmes_example_records_and_gates(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    shutil.copytree(EXAMPLE, pytester.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Its workload has 512 tokens, which a CPU computes for a second in each load of tiny-llama.
    config = config_of("random:tiny-llama") | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    (pytester.path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2, "head_dim": 32}))
    small = (f"--llm-model=tiny-llama=random:{pytester.path}", "--llm-device=cpu")
    project(*small, "--llm-update-baselines", "--llm-record-repeats=1", fast=False).assert_outcomes(passed=5)
    assert len(list(pytester.path.glob("baselines/tiny-llama/*/*.json"))) == 4
    project(*small, fast=False).assert_outcomes(passed=5)


def test_the_demo_catches_its_planted_fault(forked_python: Path) -> None:
    demo = ROOT / "examples" / "demo" / "demo.sh"
    environment = {**os.environ, "PYTEST_ADDOPTS": "--llm-workload=1x8+3"}
    command = ["bash", str(demo), str(forked_python)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "double quant was requested, but the statistics are plain float32" in done.stdout
    assert "Caught." in done.stdout
