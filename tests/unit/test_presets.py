"""Presets are the shapes they claim to be, and ``random:`` specs that are none say so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pytest_llmload.core.presets import PRESETS, config_of
from pytest_llmload.worker.checkpoints.architecture import meta_model, stored_dtype, tensors_of
from pytest_llmload.worker.checkpoints.headers import Tensor

TINY = [name for name in PRESETS if name.startswith("tiny-")]


def preset_tensors(name: str, directory: Path) -> list[Tensor]:
    (directory / "config.json").write_text(json.dumps(PRESETS[name]))
    return tensors_of(meta_model(directory), stored_dtype(PRESETS[name]))


@pytest.mark.parametrize("name", PRESETS)
def test_every_dimension_is_a_multiple_of_64(name: str, tmp_path: Path) -> None:
    for tensor in preset_tensors(name, tmp_path):
        router = tensor.name.endswith("block_sparse_moe.gate.weight")
        dimensions = tensor.shape[1:] if router else tensor.shape
        assert all(size % 64 == 0 for size in dimensions), tensor


@pytest.mark.parametrize("name", TINY)
def test_tiny_presets_are_small_and_have_a_weight_that_shows(name: str, tmp_path: Path) -> None:
    tensors = preset_tensors(name, tmp_path)
    assert 5e6 < sum(tensor.bytes for tensor in tensors) < 17e6
    # Experts are fused when they are loaded.
    experts = int(PRESETS[name].get("num_local_experts", 1))
    matrices = [tensor.bytes * (experts if ".experts." in tensor.name else 1) for tensor in tensors]
    assert max(matrices) >= 1 << 20


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-1b", 1_235_814_400),  # Llama 3.2 1B
        ("llama-7b", 6_738_415_616),  # Llama 2 7B
        ("polyglot-ko-5.8b", 5_885_059_072),  # the model card's figure
        ("polyglot-ko-12.8b", 12_893_603_840),  # 12 h^2 + 13 h a layer, two embeddings of 30080
    ],
)
def test_real_shapes_have_the_real_number_of_parameters(name: str, parameters: int, tmp_path: Path) -> None:
    assert sum(math.prod(tensor.shape) for tensor in preset_tensors(name, tmp_path)) == parameters


@pytest.mark.parametrize(("name", "head"), [("polyglot-ko-5.8b", 256), ("polyglot-ko-12.8b", 128)])
def test_polyglot_rotates_64_dimensions_of_each_head(name: str, head: int) -> None:
    config = PRESETS[name]
    assert config["hidden_size"] // config["num_attention_heads"] == head
    assert config["rotary_pct"] * head == 64


def test_the_large_moe_is_large_enough_to_show_what_tiny_ones_hide(tmp_path: Path) -> None:
    assert sum(tensor.bytes for tensor in preset_tensors("moe-128m", tmp_path)) >= 200 << 20


def test_a_preset_is_handed_out_as_a_copy() -> None:
    config_of("random:llama-1b")["rope_scaling"]["factor"] = 1
    assert config_of("random:llama-1b")["rope_scaling"]["factor"] == 32.0


def test_a_config_is_found_by_file_and_by_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert config_of(f"random:{tmp_path}") == config_of(f"random:{tmp_path}/config.json") == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("spec", "content", "said"),
    [
        ("tiny-llama", None, "write random:PRESET"),
        ("random:", None, "write random:PRESET"),
        ("random:tiny-lama", None, "is not a preset, and tiny-lama does not exist"),
        ("random:tiny-lama", None, "tiny-llama, tiny-gpt-neox"),
        ("random:config.json", "{", "cannot be read as JSON"),
        ("random:config.json", "[]", 'has no "model_type"'),
        ("random:config.json", '{"model_type": 3}', 'has no "model_type"'),
    ],
)
def test_what_is_no_random_model_is_said_in_one_sentence(
    spec: str, content: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        config_of(spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
