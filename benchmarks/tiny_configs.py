"""A tiny configuration of every model type that the installed transformers maps: its default one, each size shrunk.

Sizes are known by the names that configurations give them (:data:`SIZES`); what that does not fit is in
:data:`EXCEPTIONS`. Nothing of the plugin is imported.
"""

from __future__ import annotations

import copy
import re
from typing import Any

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS, VOCABULARY, POSITIONS = 128, 256, 4, 2, 32, 2, 512, 512

#: Family of auto classes -> transformers' table of model types, the class that loads one, in the order of preference.
FAMILIES = {
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "image-text": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "classification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForSequenceClassification"),
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
}

#: A size's name -> its tiny value; the first row that fits counts. Only larger sizes are shrunk.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)vocab_size$|^vocab_size_|^(src|tgt)_vocab_size$|^entity_vocab_size$|_vocab_size_", VOCABULARY),
    (r"(key_value_heads|kv_heads|n_head_kv|num_query_groups|multi_query_group_num|num_kv|kv_heads_.*)$", KV_HEADS),
    (r"(^|_)(attention_heads|heads|n_head|nhead|num_attention_heads|n_heads|heads_.*)$", HEADS),
    (r"^(d_kv|head_dim|attention_head_dim|attention_head_size|kv_channels|v_head_dim|.*_head_dim|head_size)$", HEAD),
    (r"^(qk_rope_head_dim|qk_nope_head_dim)$", HEAD),
    (r"^(rotary_dim)$", HEAD // 2),
    (r"(^|_)(q_lora_rank|kv_lora_rank|lora_rank|index_head_dim|.*_rank)$", 64),
    (r"(^|_)(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_moe_experts|.*_num_experts)$", 4),
    (r"(experts_per_tok(en)?|^top_?k$|moe_top_?k|num_selected_experts|moe_k|router_top_k)$", 2),
    (r"^(n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|first_k_dense_replace)$", 1),
    (r"(^|_)(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|max_.*positions|n_ctx|seq_length)$",
     POSITIONS),
    (r"(hidden_layers|^num_layers|n_layer|n_layers|_layers|^depth|decoder_depth|encoder_depth)$", LAYERS),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|inner_dim|ffn_hidden_size|mlp_dim|_ffn_.*dim|feedforward_.*)$", INNER),
    (r"^(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|emb_dim|hidden_dim|hidden_sizes?|.*_hidden_size"
     r"|.*_embed_dim|word_embed_proj_dim|projection_dim|model_dim|lm_width|output_dim|lru_width|.*_hidden_dim"
     r"|attention_hidden_size|d_embed|proj_dim|out_hidden_size|hidden_size_.*)$", HIDDEN),
    (r"^(image_size|.*_image_size)$", 32),
    (r"^(patch_size)$", 16),
    (r"^(num_query_tokens|num_queries|num_latents)$", 8),
)  # fmt: skip
#: Names that end like a size and are none.
_KEPT = re.compile(r"(token_id|_index|_ids?|_p|pdrop|dropout|_rate|_eps|theta|per_layer_input)$")
#: Token ids that have to lie in the vocabulary.
_TOKEN = re.compile(r"(token_id|token_index|(?<!_per)_token|token_ids?)$")
#: Lists with an entry for each layer.
_BY_LAYER = re.compile(r"(layer_types|layers_block_type|block_types|_layer_types|mlp_layer_types|hybrid_.*pattern)$")

_ROTARY_BY_KIND = {
    kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
}
#: One block of each kind that nemotron_h has.
_BLOCKS = ["linear_attention", "moe", "full_attention", "mlp"]
#: Convolutions over the samples of a wave.
_WAVE: dict[str, Any] = {
    "conv_dim": [HEAD] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "num_feat_extract_layers": 7,
}
#: Model type -> the family that it is measured in, where the first that maps it cannot load what it saves.
FAMILY_OF = {"emu3": "image-text", "mllama": "image-text"}

#: Model type -> what its default configuration, shrunk, still needs; a dotted name is of a part.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "xlnet": {"d_head": HEAD},
    "mamba2": {"num_heads": 8, "head_dim": HEAD},
    # Two blocks have to share their weights.
    "zamba": {
        **{"num_hidden_layers": 4, "attention_hidden_size": 256, "attention_head_dim": 64, "num_key_value_heads": 4},
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    # One layer of each kind.
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": HEAD},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": HEAD},
    # Parts of half a head: time, height, width.
    **{
        name: {"text_config.rope_parameters.mrope_section": [HEAD // 8, HEAD * 3 // 16, HEAD * 3 // 16]}
        for name in (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm_ocr", "glmga"),
            *("paddleocr_vl",),
        )
    },
    # Only half of a head is turned.
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [2, 3, 3]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n": {"text_config.num_kv_shared_layers": 0},
    # What a default configuration leaves open, or relates to a size that was shrunk.
    "bailing_hybrid": {"num_expert_group": 1},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY, "num_hidden_layers": LAYERS},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dots3_note_text": {"head_dim": 2 * HEAD, "per_layer_config": None},
    "dots3_note": {
        "text_config.head_dim": 2 * HEAD,
        "text_config.per_layer_config": None,
        "vision_config.adapter_in_dim": HIDDEN,
        "vision_config.adapter_out_dim": HIDDEN,
        "audio_config.adapter_input_size": HIDDEN,
        "audio_config.adapter_out_dim": HIDDEN,
    },
    "emu3": {"vocabulary_map": {"<image>": 8, "<|extra_200|>": 9}, "vq_config.base_channels": 32},
    "udop": {"max_2d_position_embeddings": 64},
    "cohere_compass_text": {"rope_parameters": _ROTARY_BY_KIND},
    "cohere_compass": {"text_config.rope_parameters": _ROTARY_BY_KIND},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    **{name: {"head_dim": HEAD} for name in ("hunyuan_v1_dense", "ministral")},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config.head_dim": HEAD, "text_config.rope_parameters.mrope_section": [4, 4, 4, 4]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": HEAD,
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 2 * HEAD, "zero_expert_num": 2},
    "mistral4": {"qk_head_dim": 2 * HEAD, "head_dim": 2 * HEAD},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "nemotron_h": {"num_hidden_layers": None, "layers_block_type": _BLOCKS, "mamba_num_heads": 8},
    "nemotron_h_omni": {"text_config.layers_block_type": _BLOCKS, "text_config.mamba_num_heads": 8},
    **{
        name: {
            f"{part}indexer_n_heads": 2,
            f"{part}indexer_kv_heads": 1,
            f"{part}indexer_head_dim": HEAD,
            f"{part}indexer_budget": 64,
            f"{part}indexer_compress_ratio": 4,
            f"{part}ngram_vocab_size_base": VOCABULARY,
        }
        for name, part in (("qwen4_exp_text", ""), ("qwen4_exp", "text_config."))
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [32, 96],
        "num_buckets": 8,
    },
    "xlstm": {"embedding_dim": HIDDEN, "num_blocks": LAYERS, "num_heads": HEADS},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        **{"num_hidden_layers": 4, "attention_hidden_size": 256, "attention_head_dim": 64, "num_key_value_heads": 4},
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": HEAD,
        "n_mamba_heads": 8,
    },
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": HEADS, "vocab_size": 128},
    "aria": {"projector_patch_to_query_dict": {"4": 4}, "vision_config.patch_size": 16},
    # What stands for an image in the prompt; how many tokens it takes.
    **{name: {"image_token_index": 8} for name in ("blip-2", "instructblip")},
    "instructblipvideo": {"video_token_index": 8},
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {"coordinate_size": 24, "shape_size": 16},
    "lilt": {"hidden_size": 96, "num_attention_heads": 4},
    "moonshine": {"decoder_num_key_value_heads": HEADS, "encoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "step3p7": {"text_config.sliding_window": 64},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "diffusion_gemma": {
        "canvas_length": 16,
        **{
            f"text_config.{name}": size
            for name, size in (("num_experts", 4), ("top_k_experts", 2), ("moe_intermediate_size", INNER))
        },
    },
    "chameleon": {"vocabulary_map": {"<image>": 8}, "vq_config.base_channels": 32},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "ernie4_5_vl_moe": {"text_config.moe_k": 2, "text_config.rope_parameters.mrope_section": [6, 6, 4]},
    "gemma4_assistant": {
        "init": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "text_config.num_kv_shared_layers": LAYERS,
    },
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": LAYERS},
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "qwen2_5_omni_thinker": {
        "vision_start_token_id": 500,
        "vision_end_token_id": 501,
        "text_config.rope_parameters.mrope_section": [HEAD // 8, HEAD * 3 // 16, HEAD * 3 // 16],
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 500, "vision_end_token_id": 501},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": HIDDEN, "codec_config.num_quantizers": 32},
    # Two of seven convolutions would be left of the lists.
    "speecht5": _WAVE,
    "speech-encoder-decoder": {f"encoder.{name}": value for name, value in _WAVE.items()},
    "perceiver": {
        "num_self_attends_per_block": 2,
        "d_latents": HIDDEN,
        "num_latents": 16,
        "_label_trainable_num_channels": HIDDEN,
    },
    "pix2struct": {"vision_config.patch_embed_hidden_size": 768, "vision_config.seq_len": 64},
}


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's dictionary with every known size, and every token id, made small."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = shrink(value)
        elif isinstance(value, dict) and "mrope_section" in value:
            # Parts of half a head: time, height, width.
            small[name] = {**value, "mrope_section": [HEAD // 8, HEAD * 3 // 16, HEAD * 3 // 16]}
        elif isinstance(value, bool):
            small[name] = value
        elif isinstance(value, int):
            small[name] = _size(name, value)
        elif isinstance(value, list) and value and all(type(item) is int for item in value):
            small[name] = _sizes(name, value)
        else:
            small[name] = value
    _by_layer(config, small)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        # Latent attention has as many keys as queries.
        small["num_key_value_heads"] = small.get("num_attention_heads", HEADS)
    return small


def _size(name: str, value: int) -> int:
    if _TOKEN.search(name):
        return value if value < VOCABULARY else VOCABULARY - 16 + value % 16
    if _KEPT.search(name):
        return value
    return next((min(value, tiny) for pattern, tiny in SIZES if re.search(pattern, name)), value)


def _sizes(name: str, values: list[int]) -> list[int]:
    if _TOKEN.search(name):
        return [_size(name, value) for value in values]
    return [_size(name, value) for value in values]


def _by_layer(before: dict[str, Any], config: dict[str, Any]) -> None:
    """Cut lists by layer to the layers that are left, so that each kind of layer stays if there is room."""
    counted = [name for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if name in config]
    layers, former = (config[counted[0]], before[counted[0]]) if counted else (LAYERS, 0)
    for name, value in config.items():
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value) and name != "id2label":
            config[name] = {key: item for key, item in value.items() if int(key) < layers}
        if isinstance(value, list) and (_BY_LAYER.search(name) or len(value) == former) and len(value) > layers:
            kinds = list(dict.fromkeys(map(str, value)))
            chosen = [next(item for item in value if str(item) == kind) for kind in kinds[:layers]]
            config[name] = (chosen + value)[:layers] if len(chosen) < layers else chosen


def _amend(config: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        *parts, leaf = name.split(".")
        place = config
        for part in parts:
            place = place.setdefault(part, {})
        if value is None and leaf in place:
            place.pop(leaf)
        else:
            place[leaf] = copy.deepcopy(value)


def types() -> dict[str, str]:
    """Return every mapped model type with the first family that maps it."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for family, (table, _) in FAMILIES.items():
        for model_type in getattr(modeling_auto, table):
            if FAMILY_OF.get(model_type, family) == family:
                found.setdefault(model_type, family)
    return found


def mapped(family: str) -> list[str]:
    """Return every model type that a family's auto class loads, those first that no earlier family maps."""
    from transformers.models.auto import modeling_auto

    first = types()
    return sorted(getattr(modeling_auto, FAMILIES[family][0]), key=lambda model_type: first[model_type] != family)


def class_name(model_type: str, family: str) -> str:
    """Return the class that a family's auto class takes for a model type."""
    from transformers.models.auto import modeling_auto

    named = getattr(modeling_auto, FAMILIES[family][0])[model_type]
    return named if isinstance(named, str) else named[0]


def tiny(model_type: str, family: str) -> dict[str, Any]:
    """Return the tiny configuration of a model type, as its ``config.json`` says it."""
    import transformers

    cls = transformers.CONFIG_MAPPING[model_type]
    given = EXCEPTIONS.get(model_type, {})
    default = cls(**copy.deepcopy(given.get("init", {})))
    config = shrink(default.to_dict())
    _amend(config, {name: value for name, value in given.items() if name != "init"})
    config["architectures"] = [class_name(model_type, family)]
    config["model_type"] = model_type
    # The version stays: a class may take a config without one for a checkpoint that others wrote.
    config.pop("_name_or_path", None)
    config["dtype"] = "float32"
    return config
