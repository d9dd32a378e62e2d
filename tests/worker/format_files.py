"""Small valid checkpoints of the formats that other tools write, made by hand from a dense one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

#: The output that each nibble of a word belongs to in AWQ's version gemm, from the lowest.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP = 64


def copied(
    source: Path, directory: Path, quantization: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> Path:
    """Copy a dense checkpoint, change its tensors, and have its config say how it is quantised."""
    if source != directory:
        shutil.copytree(source, directory, dirs_exist_ok=True)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    config = directory / "config.json"
    said = {"quantization_config": quantization} if quantization else {}
    config.write_text(json.dumps({**json.loads(config.read_text()), **said}))
    return directory


def projections(tensors: dict[str, Any]) -> list[str]:
    """The weights of a decoder's layers that every format quantises."""
    return [name for name in tensors if name.endswith("_proj.weight")]


def fp8(source: Path, directory: Path) -> Path:
    """float8_e4m3fn with one scale for 128 x 128 values, as DeepSeek's checkpoints have it."""

    def change(tensors: dict[str, Any]) -> None:
        for name in projections(tensors):
            weight = tensors[name].float()
            rows, columns = weight.shape[0] // 128, weight.shape[1] // 128
            blocks = weight.reshape(rows, 128, columns, 128)
            scales = blocks.abs().amax(dim=(1, 3)) / 448
            tensors[name] = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return copied(source, directory, config, change)


def _grouped(weight: Any) -> tuple[Any, Any, Any]:
    """Codes (outputs x inputs), zero points and scales (outputs x groups) of 4 bit."""
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(1, 15)
    codes = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return codes.reshape(weight.shape).int(), zeros.int(), scales


def _packed(values: Any, order: tuple[int, ...] = tuple(range(8))) -> Any:
    """Eight values of the last dimension to an int32 word, ``order[i]`` in nibble i."""
    parts = values.reshape(*values.shape[:-1], -1, 8)[..., list(order)].long()
    words = sum(parts[..., nibble] << (4 * nibble) for nibble in range(8))
    return ((words + 2**31) % 2**32 - 2**31).int()


def gptq(source: Path, directory: Path) -> Path:
    """GPTQ, version 1: the stored zero points are one lower than the real ones."""

    def change(tensors: dict[str, Any]) -> None:
        for name in projections(tensors):
            codes, zeros, scales = _grouped(tensors.pop(name))
            module = name.removesuffix("weight")
            tensors[f"{module}qweight"] = _packed(codes).t()
            tensors[f"{module}qzeros"] = _packed(zeros.t() - 1)
            tensors[f"{module}scales"] = scales.t().half()
            tensors[f"{module}g_idx"] = torch.arange(codes.shape[1], dtype=torch.int32) // GROUP

    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
    return copied(source, directory, {**config, "checkpoint_format": "gptq"}, change)


def awq(source: Path, directory: Path) -> Path:
    """AWQ, version gemm."""

    def change(tensors: dict[str, Any]) -> None:
        for name in projections(tensors):
            codes, zeros, scales = _grouped(tensors.pop(name))
            module = name.removesuffix("weight")
            tensors[f"{module}qweight"] = _packed(codes.t(), AWQ_ORDER)
            tensors[f"{module}qzeros"] = _packed(zeros.t(), AWQ_ORDER)
            tensors[f"{module}scales"] = scales.t().half()

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return copied(source, directory, config, change)


def compressed_tensors(source: Path, directory: Path) -> Path:
    """compressed-tensors W4A16: codes plus 8, eight to an int32 word along the inputs, symmetric scales."""

    def change(tensors: dict[str, Any]) -> None:
        for name in projections(tensors):
            weight = tensors.pop(name)
            groups = weight.float().reshape(weight.shape[0], -1, GROUP)
            scales = (groups.abs().amax(dim=-1) / 7.5).to(torch.bfloat16)
            codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).reshape(weight.shape).int()
            tensors[f"{name}_packed"] = _packed(codes + 8)
            tensors[f"{name}_scale"] = scales
            tensors[f"{name}_shape"] = torch.tensor(weight.shape, dtype=torch.int64)

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return copied(source, directory, config, change)


def gpt_oss(directory: Path) -> Path:
    """A tiny gpt-oss whose experts are MXFP4."""
    import transformers

    config = transformers.GptOssConfig(
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        head_dim=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=2048,
        pad_token_id=None,
        eos_token_id=1,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)

    def change(tensors: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32, 16)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.full(shape[:-1], 121, dtype=torch.uint8)

    skips = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return copied(directory, directory, {"quant_method": "mxfp4", "modules_to_not_convert": skips}, change)
