"""Architectures that ``random:PRESET`` builds, as plain Hugging Face config dicts.

The tiny ones show every effect within a second: each has a weight of at least 1 MiB, and every dimension is a multiple
of 64, as bitsandbytes' CPU packing requires. The others have the geometry of the model that they are named after.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from pytest_llmload.core.paths import path_of
from pytest_llmload.core.quoting import quoted

PREFIX = "random:"

#: Ids of the special tokens in the presets' tokenizers.
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
    "dtype": "bfloat16",
    **_IDS,
}

# Rotary embedding covers 64 dimensions of each head, as the models' cards say: 64/256 and 64/128.
_POLYGLOT_KO: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "vocab_size": 30080,
    "dtype": "float16",
    **_IDS,
}

_MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 8192,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "dtype": "bfloat16",
    **_IDS,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-llama": _TINY_LLAMA,
    "tiny-gpt-neox": {
        **_POLYGLOT_KO,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "rotary_pct": 0.5,
        "vocab_size": 1024,
    },
    "tiny-gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 384,
        "n_layer": 4,
        "n_head": 6,
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "vocab_size": 1024,
        "dtype": "bfloat16",
        **_IDS,
    },
    "tiny-qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 8192,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": 1024,
        "dtype": "bfloat16",
        **_IDS,
    },
    "tiny-mixtral": {
        **_MIXTRAL,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_local_experts": 4,
        "vocab_size": 1024,
    },
    # 128 million parameters, 244 MiB: large enough to show effects that tiny models hide (loader threads, arenas).
    "moe-128m": {
        **_MIXTRAL,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_local_experts": 8,
        "vocab_size": 8192,
    },
    "llama-1b": {
        **_TINY_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "llama-7b": {
        **_TINY_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "dtype": "float16",
    },
    "polyglot-ko-5.8b": {
        **_POLYGLOT_KO,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "rotary_pct": 0.25,
    },
    "polyglot-ko-12.8b": {
        **_POLYGLOT_KO,
        "hidden_size": 5120,
        "intermediate_size": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "rotary_pct": 0.5,
    },
}


def config_of(spec: str) -> dict[str, Any]:
    """Return the config of ``random:PRESET`` or ``random:PATH`` (a ``config.json`` or a directory that has one).

    Raises ValueError that says what is wrong, where, and what to write instead.
    """
    what = spec.removeprefix(PREFIX)
    if what == spec or not what:
        raise ValueError(
            f"{quoted(spec)} is not a random model: write random:PRESET or random:PATH, as in random:tiny-llama"
        )
    if what in PRESETS:
        return copy.deepcopy(PRESETS[what])
    path = path_of(what)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ValueError(
            f"{quoted(spec)} is not a preset, and {_shown(path)} does not exist: give a config.json, a directory "
            f"that has one, or a preset ({', '.join(PRESETS)})"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{_shown(path)} cannot be read as JSON ({error}): {quoted(spec)} needs a model's config.json"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{path} has no "model_type": {quoted(spec)} needs the config.json of a transformers model')
    return config


def _shown(path: Path) -> str:
    """Return a path as errors show it: unchanged, or quoted with escapes if it cannot be printed."""
    return str(path) if str(path).isprintable() else repr(str(path))
