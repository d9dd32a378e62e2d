"""What the tests of planted faults share: the one problem that a load has, and checkpoints that lack something."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from loads import checkpoint, quick
from safetensors.torch import load_file, save_file

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.results import LoadResult, Problem

Tamper = Callable[[Any], None]

fused_experts = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 keeps experts as a list of Linear"
)


def the_problem(result: LoadResult, check: str) -> Problem:
    assert result.outcome == "not_applied"
    found = [problem for problem in result.problems if problem.check == check]
    assert len(found) == 1, result.problems
    return found[0]


def only_problem(result: LoadResult, check: str) -> Problem:
    found = the_problem(result, check)
    assert result.problems == [found]
    return found


def by_loader(files: str | Checkpoint, **fields: Any) -> LoadResult:
    return quick(files, strategy="loader", target="loads:plain_loader", **fields)


def without(preset: str, directory: Path, *names: str) -> Checkpoint:
    """A copy of a checkpoint that lacks tensors."""
    source = checkpoint(preset)
    shutil.copytree(source.path, directory, dirs_exist_ok=True)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, file, {"format": "pt"})
    return Checkpoint(str(directory), "shape", "weights")
