"""The random LoRA: on architectures whose projections have other names, or that PEFT does not tune everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from loads import adapter_files, checkpoint, quick
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.worker.checkpoints.resolve import resolve

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
ATTENTION = {**SIZES, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LATENT = {
    "head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
}
MOE = {"ffn_hidden_size": 256, "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "moe_topk": 2, "zero_expert_num": 2}
#: Type -> its config, a module that the adapter tunes, and one that it must leave alone.
TYPES: dict[str, tuple[dict[str, Any], str, str]] = {
    "mamba": ({**SIZES, "state_size": 16}, "mixer.in_proj", "mixer.out_proj"),
    "falcon_mamba": ({**SIZES, "state_size": 16}, "mixer.in_proj", "mixer.out_proj"),
    "mamba2": (
        {**SIZES, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1},
        "mixer.in_proj",
        "mixer.out_proj",
    ),
    "git": (
        {**SIZES, "intermediate_size": 128, "num_attention_heads": 2, "vision_config": {**VISION, "image_size": 32}},
        "layer.0.attention.self.query",
        "image_encoder",
    ),
    "gemma4_text": (ATTENTION, "self_attn.q_proj", "mlp"),
    "longcat_flash": ({**SIZES, "num_layers": 2, "num_attention_heads": 2, **LATENT, **MOE}, "0.q_a_proj", "experts"),
    # The wrapper of the decoder says that it takes sound.
    "whisper": (
        {
            **{"d_model": 128, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 256},
            **{
                "vocab_size": 1024,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
        },
        "self_attn.q_proj",
        "fc1",
    ),
    "falcon": ({**SIZES, "num_attention_heads": 2}, "self_attention.query_key_value", "dense_h_to_4h"),
}


def built(name: str, config: dict[str, Any], folder: Path) -> Checkpoint:
    described = AutoConfig.for_model(name, **config).to_dict()
    described["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]]
    (folder / "config.json").write_text(json.dumps(described))
    return resolve(f"random:{folder}", folder / "cache")


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="architectures of transformers 5")
@pytest.mark.parametrize("name", TYPES)
def test_it_tunes_what_tokens_reach_and_peft_takes(name: str, tmp_path: Path) -> None:
    config, tuned, left = TYPES[name]
    checkpoint = built(name, config, tmp_path)
    result = quick(checkpoint, adapter="random")
    assert [problem.message for problem in result.problems] == []
    targets = json.loads((Path(adapter_files("random", checkpoint).path) / "adapter_config.json").read_text())
    assert any(target.endswith(tuned) for target in targets["target_modules"])
    assert not [target for target in targets["target_modules"] if left in target]


#: What the head's weight is to a class without one.
WITHOUT_A_HEAD = (("keys_ok", '["lm_head.weight"]'),)


def test_it_fits_the_class_that_is_loaded() -> None:
    """PEFT's wrapper of a causal model needs what generates; the bare model has other names, and does not generate."""
    result = quick("tiny-llama", adapter="random", auto_class="AutoModel", options=WITHOUT_A_HEAD)
    assert [problem.message for problem in result.problems] == []
    assert result.metrics["weights.adapter"] > 0


def test_a_config_that_names_a_different_class_has_an_adapter_of_its_own(tmp_path: Path) -> None:
    for cls, options in (("LlamaForCausalLM", ()), ("LlamaModel", WITHOUT_A_HEAD)):
        folder = tmp_path / cls
        shutil.copytree(checkpoint("tiny-llama").path, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [cls]}))
        result = quick(resolve(str(folder), tmp_path / "cache"), adapter="random", options=options)
        assert [problem.message for problem in result.problems] == []
