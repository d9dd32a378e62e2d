"""Generating: fixed tokens, the model's limit, and a tokenizer that does not load."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from loads import checkpoint, load

from pytest_llmload.core.spec import Workload
from pytest_llmload.worker.model.generation import generate, workload_tokens
from pytest_llmload.worker.model.loaded import Loaded


def test_fixed_tokens_are_fixed() -> None:
    rows = workload_tokens(Workload(2, 4, 1), 1000)
    assert rows == [[361, 949, 273, 618], [311, 770, 828, 146]]
    assert all(64 <= token < 1000 for row in rows for token in row)
    assert all(0 <= token < 50 for row in workload_tokens(Workload(1, 200, 1), 50) for token in row)
    assert rows[0] == workload_tokens(Workload(1, 9, 1), 1000)[0][:4]


def test_a_workload_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"workload 1x100000\+8 needs 100008 positions, the model has"):
        load("tiny-llama", workload=Workload(1, 100000, 8))


def test_a_tokenizer_that_does_not_load_is_reported_when_text_is_requested(tmp_path: Path) -> None:
    files = checkpoint("tiny-llama")
    shutil.copytree(files.path, tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    result, loaded = load(dataclasses.replace(files, path=str(tmp_path / "broken")))
    assert not result.problems
    with pytest.raises(ValueError, match=r"no tokenizer for the text \(.*\); give token ids instead"):
        generate(loaded, "hello", 2)
    assert loaded.tokenizer_error != Loaded.tokenizer_error
    assert len(generate(loaded, [1, 2, 3], 2)["tokens"]) == 2
    last = loaded.model.get_input_embeddings().num_embeddings - 1
    assert len(generate(loaded, [last], 1)["tokens"]) == 1
    for token in (last + 1, -1):
        with pytest.raises(ValueError, match=f"embeddings for the token ids 0 to {last}; got {token}"):
            generate(loaded, [1, token], 2)
