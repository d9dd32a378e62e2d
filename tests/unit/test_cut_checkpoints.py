"""``--llm-layers``: a model's first layers as a checkpoint of their own, of every way to count and to name layers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.worker.checkpoints.build import write_weights
from pytest_llmload.worker.checkpoints.cut import cut_adapter, cut_checkpoint, cut_config_of
from pytest_llmload.worker.checkpoints.headers import (
    INDEX,
    WEIGHTS,
    read_index,
    read_metadata,
)
from pytest_llmload.worker.checkpoints.kept_layers import KeptLayers, kept_layers
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checkpoints.weights import read_tensors, weight_files

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 128,
    **IDS,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
#: Model type -> config, and what its cut to two layers of each kind must say.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (SMALL, {"num_hidden_layers": 2}),
    "gpt2": ({"n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 128, **IDS}, {"n_layer": 2}),
    "gpt_neo": (
        {"hidden_size": 64, "num_layers": 6, "num_heads": 4, "vocab_size": 128, **IDS,
         "attention_types": [[["global", "local"], 3]]},
        {"num_layers": 4, "attention_types": [[["global", "local", "global", "local"], 1]]},
    ),
    "t5": (
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 6, "num_decoder_layers": 4, "num_heads": 4,
         "vocab_size": 128, "decoder_start_token_id": 0, **IDS},
        {"num_layers": 2, "num_decoder_layers": 2},
    ),
    "bart": (
        {"d_model": 64, "encoder_layers": 6, "decoder_layers": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128, **IDS},
        {"encoder_layers": 2, "decoder_layers": 2},
    ),
    "gemma3_text": (
        {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
         "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
        {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "qwen2_moe": (
        {**SMALL, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 32, "mlp_only_layers": [1, 4]},
        {"num_hidden_layers": 4, "mlp_only_layers": [1, 3]},
    ),
    # Dense layers, then experts.
    "deepseek_v3": (
        {**SMALL, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
         "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
         "topk_group": 1, "num_key_value_heads": 4, "first_k_dense_replace": 3},
        {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    ),
    # The config says only how often attention comes: the class derives the types.
    "qwen3_next": (
        {**SMALL, "num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4,
         "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2},
        {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2},
    ),
    # Three kinds, by two periods, which no shorter list of layers has: the shortest beginning with two of each.
    "jamba": (
        {**SMALL, "num_hidden_layers": 12, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1,
         "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
         "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
        {"num_hidden_layers": 7},
    ),
    "zamba2": (
        {**SMALL, "num_hidden_layers": 8, "num_mem_blocks": 1, "mamba_d_state": 8, "n_mamba_heads": 4,
         "mamba_headdim": 32, "mamba_ngroups": 1, "attention_hidden_size": 128, "attention_head_dim": 32,
         "chunk_size": 16, "layers_block_type": [*["linear_attention"] * 3, "hybrid"] * 2},
        {"num_hidden_layers": 4, "layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2},
    ),
    "lfm2_moe": (
        {**SMALL, "num_key_value_heads": 2, "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "layer_types": ["conv", "conv", "conv", "conv", "full_attention", "conv"]},
        {"num_hidden_layers": 4, "num_dense_layers": 1, "layer_types": ["conv", "conv", "conv", "full_attention"]},
    ),
    "llava": (
        {"text_config": {"model_type": "llama", **SMALL}, "image_token_index": 5,
         "vision_config": {"model_type": "clip_vision_model", **TOWER, "image_size": 16, "patch_size": 8}},
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config_of(model_type: str) -> dict[str, Any]:
    fields = FAMILIES[model_type][0]
    config = transformers.AutoConfig.for_model(model_type)
    architecture = {
        "t5": "T5ForConditionalGeneration",
        "bart": "BartForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration",
    }
    named = architecture.get(model_type) or transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
    return {"model_type": model_type, "architectures": [named], "dtype": "float32", **fields}


def whole(model_type: str, cache: Path, folder: Path) -> Path:
    """Return a checkpoint of six layers with random weights, in several files."""
    (folder / "config.json").write_text(json.dumps(config_of(model_type)))
    built = Path(resolve(f"random:{folder}", cache).path)
    shutil.copytree(built, folder / "whole", ignore=shutil.ignore_patterns(WEIGHTS))
    write_weights(folder / "whole", read_tensors(built), shard_bytes=64 << 10)
    return folder / "whole"


NEEDS_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4.57 cannot build it"
)


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[NEEDS_5] * (name in ("zamba2", "lfm2_moe"))) for name in FAMILIES]
)
def test_a_cut_holds_the_first_layers_of_each_kind_and_loads(model_type: str, cache: Path, tmp_path: Path) -> None:
    source = whole(model_type, cache, tmp_path)
    cut, stacks = cut_checkpoint(source, 2, cache)
    config = json.loads((cut / "config.json").read_text())
    wanted = FAMILIES[model_type][1]
    assert {name: config[name] for name in wanted} == wanted
    kept, every = _values(cut), _values(source)
    old = {new: name for name in every if (new := KeptLayers(stacks).placed(name)) is not None}
    assert kept.keys() == old.keys()
    assert all(torch.equal(kept[name], every[old[name]]) for name in kept)
    cls = getattr(transformers, config["architectures"][0])
    _, found = cls.from_pretrained(cut, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]


def _values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in weight_files(folder) for name, value in load_file(file).items()}


def test_a_tower_for_pictures_stays_whole(cache: Path, tmp_path: Path) -> None:
    cut, _ = cut_checkpoint(whole("llava", cache, tmp_path), 2, cache)
    names = [tensor.name for tensor in read_tensors(cut)]
    assert {int(found[1]) for name in names if (found := re.search(r"vision.*layers\.(\d+)\.", name))} == {
        0,
        1,
        2,
        3,
        4,
    }
    assert {int(found[1]) for name in names if (found := re.search(r"language.*layers\.(\d+)\.", name))} == {0, 1}


def test_files_without_a_kept_tensor_are_not_needed(cache: Path, tmp_path: Path) -> None:
    source = whole("llama", cache, tmp_path)
    beyond = {file for name, file in read_index(source / INDEX).items() if ".layers.5." in name}
    others = {file for name, file in read_index(source / INDEX).items() if ".layers.5." not in name}
    assert beyond - others
    for name in beyond - others:
        (source / name).unlink()
    assert len(read_tensors(cut_checkpoint(source, 2, cache)[0])) == 2 * 9 + 3


def test_one_file_loses_the_layers_and_keeps_its_metadata(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "whole"
    shutil.copytree(resolve("random:tiny-llama", cache).path, source)
    values = load_file(source / WEIGHTS)
    # As a quantised file has them: tensors that the class does not know, and texts that say what they are.
    values |= {f"model.layers.{number}.self_attn.q_proj.weight.absmax": torch.ones(8) for number in range(3)}
    values["model.layers.3.next_token.weight"] = torch.ones(4)
    save_file(values, source / WEIGHTS, {"format": "pt", "quantised": "yes"})
    cut, _ = cut_checkpoint(source, 1, cache)
    assert read_metadata(cut / WEIGHTS) == {"format": "pt", "quantised": "yes"}
    numbered = {tensor.name for tensor in read_tensors(cut) if ".layers." in tensor.name}
    assert "model.layers.0.self_attn.q_proj.weight.absmax" in numbered
    assert {name.split(".")[2] for name in numbered} == {"0"}


def test_a_cut_of_a_folder_is_the_cut_of_its_preset(cache: Path) -> None:
    source = resolve("random:tiny-llama", cache)
    preset, folder = resolve("random:tiny-llama", cache, layers=2), resolve(source.path, cache, layers=2)
    assert preset.shape == folder.shape != source.shape
    assert preset.bytes == folder.bytes
    values = load_file(Path(preset.path) / WEIGHTS), load_file(Path(folder.path) / WEIGHTS)
    assert values[0].keys() == values[1].keys()
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_a_cut_is_made_anew_once_the_checkpoint_changes(cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "whole"
    shutil.copytree(resolve("random:tiny-llama", cache).path, source)
    before = resolve(str(source), cache, layers=2)
    assert resolve(str(source), cache, layers=2) == before
    values = load_file(source / WEIGHTS)
    values["lm_head.weight"] += 1
    save_file(values, source / WEIGHTS, {"format": "pt"})
    after = resolve(str(source), cache, layers=2)
    assert (after.shape, after.weights != before.weights) == (before.shape, True)
    values["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(values, source / WEIGHTS, {"format": "pt"})
    # What is left out is no part of what is loaded.
    assert resolve(str(source), cache, layers=2).weights == after.weights


@pytest.mark.parametrize("layers", [3, 4])
def test_a_cut_that_leaves_nothing_out_is_refused(layers: int, cache: Path) -> None:
    with pytest.raises(MachineError, match=rf"'llama' has 3 layers, and a cut to {layers} leaves none of them out"):
        resolve("random:tiny-llama", cache, layers=layers)


def test_what_has_no_count_of_layers_is_refused() -> None:
    towers = {"model_type": "clip_vision_model", **TOWER, "image_size": 16, "patch_size": 8}
    with pytest.raises(MachineError, match="'clip_vision_model' says nowhere how many layers it has"):
        cut_config_of(towers, 2)
    with pytest.raises(MachineError, match="cannot read the model's config"):
        cut_config_of({"model_type": "from-the-future"}, 2)


def test_a_cut_that_is_no_part_of_the_whole_is_refused() -> None:
    every = {f"layers.{number}.weight": (4, 4) for number in range(3)} | {"head.weight": (3, 4)}
    one = {"layers.0.weight": (4, 4), "head.weight": (3, 4)}
    assert kept_layers(every, one, {3: (2,)}, 1).stacks == {"layers": (2,)}
    with pytest.raises(MachineError, match=r"its tensor head\.weight is \[1, 4\] in 1 layer and \[3, 4\] in all"):
        kept_layers(every, {**one, "head.weight": (1, 4)}, {3: (0,)}, 1)
    with pytest.raises(MachineError, match=r"that would take away head\.weight too"):
        kept_layers(every, {"layers.0.weight": (4, 4)}, {3: (0,)}, 1)


def test_a_checkpoint_without_safetensors_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny-llama"]))
    with pytest.raises(LoadFailed, match="holds no weights that can be cut"):
        cut_checkpoint(tmp_path, 1, tmp_path)


def test_an_adapter_loses_what_it_holds_for_layers_that_are_left_out(cache: Path, tmp_path: Path) -> None:
    from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter

    adapter = resolve_adapter("random", resolve("random:tiny-llama", cache), cache)
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    config = json.loads((own / "adapter_config.json").read_text())
    (own / "adapter_config.json").write_text(json.dumps({**config, "layers_to_transform": [0, 1, 2]}))
    checkpoint = resolve("random:tiny-llama", cache, layers=2)
    cut = cut_adapter(own, dict(checkpoint.kept_layers), 2, cache)
    kept, every = load_file(cut / "adapter_model.safetensors"), load_file(own / "adapter_model.safetensors")
    assert kept.keys() == {name for name in every if ".layers.2." not in name}
    assert json.loads((cut / "adapter_config.json").read_text())["layers_to_transform"] == [0, 1]
    assert resolve_adapter(str(own), checkpoint, cache, layers=2) == cut


def test_a_hybrid_has_other_numbers_in_every_name_of_its_cut(cache: Path, tmp_path: Path) -> None:
    from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter

    source = whole("qwen3_next", cache, tmp_path)
    config = json.loads((source / "config.json").read_text())
    skipped = ["model.layers.3.mlp.gate", "model.layers.4.mlp.gate", "model.layers.7.mlp.gate", "lm_head"]
    quantised = {"quant_method": "fp8", "modules_to_not_convert": skipped}
    cut = cut_config_of({**config, "quantization_config": quantised}, 1)
    assert cut[0]["quantization_config"]["modules_to_not_convert"] == ["model.layers.1.mlp.gate", "lm_head"]
    assert list(cut[1].values()) == [(0, 3)]
    checkpoint = resolve(str(source), cache, layers=1)
    assert checkpoint.kept_layers == cut[1]
    adapter = resolve_adapter("random", resolve(str(source), cache), cache)
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    settings = json.loads((own / "adapter_config.json").read_text())
    changes = {"layers_to_transform": [2, 3], "rank_pattern": {"model.layers.3.self_attn.q_proj": 4, "lm_head": 4}}
    (own / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    found = resolve_adapter(str(own), checkpoint, cache, layers=1)
    kept = json.loads((found / "adapter_config.json").read_text())
    assert kept["layers_to_transform"] == [1]
    assert kept["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 4, "lm_head": 4}
    numbers = {name.split(".layers.")[1].split(".")[0] for name in load_file(found / "adapter_model.safetensors")}
    assert numbers == {"0", "1"}


def test_a_hybrid_whose_every_kind_has_few_layers_cannot_be_cut(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match="has 8 layers, and a cut to 6 of each of its 2 kinds leaves none of them out"
    ):
        cut_checkpoint(whole("qwen3_next", cache, tmp_path), 6, cache)
