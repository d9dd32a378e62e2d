"""``python gguf_model.py FOLDER FILE``: write a small checkpoint of a Llama as GGUF, as llama.cpp's converter would.

Runs in the environment of a llama.cpp server: it needs gguf and numpy only.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy

#: A tensor's name in the checkpoint -> in GGUF.
_NAMES = (
    (r"model\.embed_tokens\.weight", "token_embd.weight"),
    (r"model\.norm\.weight", "output_norm.weight"),
    (r"lm_head\.weight", "output.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"blk.\1.attn_norm.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"blk.\1.ffn_norm.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", r"blk.\1.attn_\2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"blk.\1.attn_output.weight"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"blk.\1.ffn_\2.weight"),
)


def tensors(file: Path) -> dict[str, Any]:
    """Return each tensor of a safetensors file in bf16, as fp32: numpy has no bf16."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, row in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        assert row["dtype"] == "BF16", row["dtype"]
        first, last = row["data_offsets"]
        short = numpy.frombuffer(data[8 + size + first : 8 + size + last], dtype=numpy.uint16)
        found[name] = (short.astype(numpy.uint32) << 16).view(numpy.float32).reshape(row["shape"])
    return found


def permuted(weight: Any, heads: int) -> Any:
    """Order the rows of q and k as llama.cpp's rotary embedding wants them (its converter's ``LlamaModel.permute``)."""
    rows, *rest = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def write(folder: Path, file: Path, matrices: str = "F32") -> None:
    """Write a checkpoint as GGUF; ``matrices`` is the type of every weight of two dimensions."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {row["content"] for row in tokenizer["added_tokens"]}
    words = [row["content"] for row in tokenizer["added_tokens"] if row["content"] not in words] + words
    kinds = [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    writer.add_chat_template(settings["chat_template"])
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, weight in tensors(next(folder.glob("*.safetensors"))).items():
        for pattern, replacement in _NAMES:
            if found := re.fullmatch(pattern, name):
                part = found[2] if found.lastindex == 2 else ""
                data = permuted(weight, heads[part]) if part in heads else weight
                own = gguf.GGMLQuantizationType[matrices if data.ndim == 2 else "F32"]
                values = numpy.ascontiguousarray(data)
                writer.add_tensor(found.expand(replacement), gguf.quantize(values, own), raw_dtype=own)
                break
        else:
            raise ValueError(f"no name in GGUF for {name}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
