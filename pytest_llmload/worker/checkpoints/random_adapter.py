"""LoRA adapters: one with random, non-zero weights for any causal model, or the one that was named."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import Checkpoint
from pytest_llmload.worker.checkpoints import random_values
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checkpoints.build import write_file, write_json, write_once
from pytest_llmload.worker.checkpoints.headers import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tensor
from pytest_llmload.worker.checkpoints.hub import download_adapter

RANK, ALPHA = 8, 16
VERSION = 1

#: Projections of the attention, by the names that architectures give them.
_ATTENTION = re.compile(
    r"(attn|attention)\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|Wqkv|query_key_value|dense|c_attn|c_proj|q|k|v|o)$"
)


def resolve_adapter(spec: str, checkpoint: Checkpoint, cache_dir: Path, *, trust_remote_code: bool = False) -> Path:
    """The directory of ``random``, of a local adapter or of a hub id.

    Raises ValueError for what can be none of these, LoadFailed for a directory without an adapter, MachineError where
    a download or the disk fails.
    """
    if spec == "random":
        return build_adapter(checkpoint, cache_dir, trust_remote_code=trust_remote_code)
    directory = Path(spec).expanduser()
    if not directory.is_dir():
        return download_adapter(spec)
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (directory / file).is_file()]
    if missing:
        raise LoadFailed(f"{directory} is no PEFT adapter in safetensors: it has no {' and no '.join(missing)}")
    return directory.resolve()


def build_adapter(checkpoint: Checkpoint, cache_dir: Path, *, trust_remote_code: bool = False) -> Path:
    """A LoRA (rank 8, alpha 16, fp32) on the attention projections of ``checkpoint``; built if it is not there yet.

    Both factors are non-zero, so that the adapter changes every output. Raises ValueError where the model has no
    linear layer, MachineError where the cache cannot be written.
    """

    def write(directory: Path) -> None:
        projections = _projections(meta_model(Path(checkpoint.path), trust_remote_code=trust_remote_code))
        if not projections:
            raise ValueError(
                f"{checkpoint.path} has no linear layer that a LoRA could tune: give an adapter with --llm-adapter"
            )
        _write(directory, projections)

    # Module names are transformers', so its version is part of the key.
    key = digest([VERSION, random_values.VERSION, checkpoint.shape, version("transformers")], 12)
    target = cache_dir / "adapters" / f"{checkpoint.model_type}-lora-{key}"
    write_once(target, write)
    return target


def _projections(model: Any) -> dict[str, tuple[int, int, bool]]:
    """Module name -> inputs, outputs, whether its weight is stored (in, out) as the GPT-2 family does.

    Where no name is known, every layer but the output head that PEFT itself would call linear.
    """
    from torch import nn

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {
        name: module
        for name, module in model.named_modules()
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    known = {name: module for name, module in linear.items() if _ATTENTION.search(name)}
    found = {}
    for name, module in (known or linear).items():
        rows, columns = module.weight.shape
        transposed = type(module).__name__ == "Conv1D"
        found[name] = (rows, columns, True) if transposed else (columns, rows, False)
    return found


def _write(directory: Path, projections: dict[str, tuple[int, int, bool]]) -> None:
    tensors = []
    for name, (inputs, outputs, _) in projections.items():
        prefix = f"base_model.model.{name}"
        tensors.append(Tensor(f"{prefix}.lora_A.weight", (RANK, inputs), "F32"))
        tensors.append(Tensor(f"{prefix}.lora_B.weight", (outputs, RANK), "F32"))
    write_file(directory / ADAPTER_WEIGHTS, sorted(tensors, key=lambda tensor: tensor.name))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(transposed for _, _, transposed in projections.values()),
        # The last two names: "dense" alone would also match layers elsewhere.
        "target_modules": sorted({".".join(name.split(".")[-2:]) for name in projections}),
    }
    write_json(directory / ADAPTER_CONFIG, config)
