"""Find LoRA adapters, or build one with random, non-zero weights for any causal model."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import Checkpoint
from pytest_llmload.worker.checkpoints import random_values
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checkpoints.build import write_file, write_json, write_once
from pytest_llmload.worker.checkpoints.cut import cut_adapter
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.headers import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Tensor
from pytest_llmload.worker.checkpoints.hub import download_adapter

RANK, ALPHA = 8, 16
VERSION = 5

#: Projections of the attention, by the names that architectures use.
_ATTENTION = re.compile(
    r"(attn|attention)\.(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|Wqkv|query_key_value|dense|c_attn|c_proj|q|k|v|o)$"
)
#: Every linear layer of an attention, with any name.
_IN_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*\.")
_ANY = re.compile("")


def resolve_adapter(
    spec: str,
    checkpoint: Checkpoint,
    cache_dir: Path,
    *,
    trust_remote_code: bool = False,
    layers: int | None = None,
    auto_class: str | None = None,
) -> Path:
    """Return the directory of ``random``, of a local adapter or of a hub id; with ``layers``, of what it holds for the
    layers of a cut ``checkpoint``. A random one fits the class that ``auto_class`` loads, by default the config's own.

    Raises ValueError for what can be none of these, LoadFailed for a directory without an adapter, MachineError where
    a download or the disk fails.
    """
    if spec == "random":
        return build_adapter(checkpoint, cache_dir, trust_remote_code=trust_remote_code, auto_class=auto_class)
    directory = Path(spec).expanduser()
    found = _local_adapter(directory) if directory.is_dir() else download_adapter(spec)
    return found if layers is None else cut_adapter(found, dict(checkpoint.kept_layers), layers, cache_dir)


def _local_adapter(directory: Path) -> Path:
    """Return the directory of an adapter. Raises LoadFailed where it is not one."""
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (directory / file).is_file()]
    if missing:
        raise LoadFailed(f"{directory} is not a PEFT adapter in safetensors: it has no {' and no '.join(missing)}")
    return directory.resolve()


def build_adapter(
    checkpoint: Checkpoint, cache_dir: Path, *, trust_remote_code: bool = False, auto_class: str | None = None
) -> Path:
    """Return the directory of a LoRA (rank 8, alpha 16, fp32) on the attention; build it if it does not exist.

    Both factors are non-zero, so that the adapter changes every output. Raises ValueError if the model has no linear
    layer, MachineError if the cache cannot be written.
    """

    def write(directory: Path) -> None:
        model = meta_model(Path(checkpoint.path), trust_remote_code=trust_remote_code, auto_class=auto_class)
        projections = _projections(model)
        if not projections:
            raise ValueError(
                f"{checkpoint.path} has no linear layer that PEFT tunes with a LoRA; give an adapter with --llm-adapter"
            )
        _write(directory, projections, _targets(model, list(projections)), _task(model))

    # Module names are those of a class of transformers, so its version is part of the key.
    cls = [auto_class] if auto_class else read_config(Path(checkpoint.path)).get("architectures") or []
    key = digest([VERSION, random_values.VERSION, checkpoint.shape, version("transformers"), cls], 12)
    target = cache_dir / "adapters" / f"{checkpoint.model_type}-lora-{key}"
    write_once(target, write)
    return target


def _projections(model: Any) -> dict[str, tuple[int, int, bool]]:
    """Return the modules to tune: name -> inputs, outputs, and true if its weight is (in, out) as in the GPT-2 family.

    They are the attention's projections by name, else all linear layers of an attention, else all linear layers except
    the output head. Modules that a prompt of tokens does not reach, or that PEFT would not tune as they are, are left
    out.
    """
    from torch import nn

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    reads_tokens = _reads_tokens(model)
    every = {
        name: module
        for name, module in model.named_modules()
        if module is not head
        and (type(module).__name__ == "Conv1D" or (isinstance(module, nn.Linear) and _is_plain(module)))
    }
    # A model of which no part says that it reads tokens hears: its prompt reaches every part.
    linear = {name: module for name, module in every.items() if reads_tokens(name)} or every
    for pattern in (_ATTENTION, _IN_ATTENTION, _ANY):
        names = _accepted(model, [name for name in linear if pattern.search(name)])
        if names:
            break
    found = {}
    for name in names:
        rows, columns = linear[name].weight.shape
        transposed = type(linear[name]).__name__ == "Conv1D"
        found[name] = (rows, columns, True) if transposed else (columns, rows, False)
    return found


def _is_plain(module: Any) -> bool:
    """Return true if a Linear, or a subclass of it, gives ``out_features`` numbers for each row of its inputs.

    The output projection of torch's own attention is excluded, since it is never called.
    """
    import torch

    if type(module) is torch.nn.Linear:
        return True
    if isinstance(module, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    row = torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        given = module(row)
        # A router that is a subclass gives scores and choices.
        return isinstance(given, torch.Tensor) and tuple(given.shape) == (1, module.out_features)
    except (RuntimeError, TypeError, ValueError, IndexError):
        # A class with a different geometry, such as a grouped Linear.
        return False


def _reads_tokens(model: Any) -> Callable[[str], bool]:
    """Return a function that tells whether a prompt of tokens reaches a module of a model, from the module's name.

    In a composite model, parts that read images or sound are not reached. The innermost part that says what it reads
    decides, since the wrapper of a speech model's decoder inherits the main input of the encoder.
    """
    parts = {name: part for name, part in model.named_modules() if name and hasattr(part, "main_input_name")}
    reads = {
        name: "input_ids" in inspect.signature(part.forward).parameters
        or part.main_input_name in ("input_ids", "inputs_embeds")
        for name, part in parts.items()
    }

    def told(name: str) -> bool:
        while name:
            name = name.rpartition(".")[0]
            if name in reads:
                return reads[name]
        return True

    return told


def _accepted(model: Any, names: list[str]) -> list[str]:
    """Return the modules that PEFT tunes, and for which it tunes no other module instead, when they are requested.

    Return all if PEFT is not installed. Modules of one name are accepted or refused together in all layers.
    """
    if find_spec("peft") is None or not names:
        return names
    if _tuned(model, names) == set(names):
        return names
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return [name for group in groups.values() if _tuned(model, group) == set(group) for name in group]


def _tuned(model: Any, names: list[str]) -> set[str]:
    """Return the modules that PEFT wraps if some modules of a model on the meta device are requested."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    attempt = copy.deepcopy(model)
    try:
        inject_adapter_in_model(
            LoraConfig(r=RANK, target_modules=_targets(model, names)), attempt, low_cpu_mem_usage=True
        )
    except (ValueError, NotImplementedError):
        # PEFT raises the one for modules that it refuses in an architecture, and transformers the other where PEFT asks
        # for an input embedding that the class does not name.
        return set()
    return {name for name, module in attempt.named_modules() if isinstance(module, BaseTunerLayer)}


def _targets(model: Any, names: list[str]) -> list[str]:
    """Return ``target_modules`` for some modules: the last two parts of their names, or whole names if ambiguous."""
    short = {".".join(name.split(".")[-2:]) for name in names}
    hit = {name for name, _ in model.named_modules() if ".".join(name.split(".")[-2:]) in short}
    return sorted(short if hit == set(names) else names)


def _task(model: Any) -> str | None:
    """Return PEFT's task of a model; None unless it is one whose wrapper of PEFT needs what generates from text.

    The wrapper of a task requires methods and inputs that other models lack; without a task PEFT passes all inputs on.
    """
    config = getattr(model, "config", None)
    # The wrapper always passes embeddings on, which a class without them hands to whatever part takes the rest.
    embedded = "inputs_embeds" in inspect.signature(model.forward).parameters
    generates = hasattr(model, "prepare_inputs_for_generation") and model.can_generate()
    return "CAUSAL_LM" if generates and embedded and not getattr(config, "is_encoder_decoder", False) else None


def _write(
    directory: Path, projections: dict[str, tuple[int, int, bool]], targets: list[str], task: str | None
) -> None:
    tensors = []
    for name, (inputs, outputs, _) in projections.items():
        prefix = f"base_model.model.{name}"
        tensors.append(Tensor(f"{prefix}.lora_A.weight", (RANK, inputs), "F32"))
        tensors.append(Tensor(f"{prefix}.lora_B.weight", (outputs, RANK), "F32"))
    write_file(directory / ADAPTER_WEIGHTS, sorted(tensors, key=lambda tensor: tensor.name))
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(transposed for _, _, transposed in projections.values()),
        "target_modules": targets,
    }
    write_json(directory / ADAPTER_CONFIG, config)
