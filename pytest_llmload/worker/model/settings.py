"""What a model is besides its modules, as short texts by name: its configuration, its modes, its attention."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.units import counted
from pytest_llmload.worker.model.loaded import Loaded

#: Fields of a config that say where a model came from and which release wrote it.
_ORIGIN = frozenset({"_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "auto_map"})
#: Attributes of modules that follow from the place in the model, or from shapes that the manifest has.
_PLACE = frozenset(
    {
        *("training", "layer_idx", "layer_id", "layer_index", "in_features", "out_features", "num_embeddings"),
        *("embedding_dim", "gradient_checkpointing", "name_or_path"),
        # What bitsandbytes' modules find out about the machine.
        "support_avx512bf16_for_cpu",
    }
)
_PLAIN = (bool, int, float, str)
#: A text that is longer is stored as a digest.
_LONG = 80
#: Different values of one attribute that are listed.
_VALUES = 3


def settings(loaded: Loaded) -> dict[str, str]:
    """Return every field of the config and generation config, each class's own constants, attention, and modes."""
    found: dict[str, str] = {}
    for prefix, config in (("config", loaded.config), ("generation", _generation_config(loaded))):
        content = config.to_dict() if hasattr(config, "to_dict") else {}
        found |= dict(_fields(prefix, content, (loaded.job.checkpoint.path, loaded.job.spec.model)))
    found |= _constants(loaded)
    found["attention"] = attention(loaded)
    found |= modes(loaded)
    return found


def attention(loaded: Loaded) -> str:
    """Return the implementation that the model's parts dispatch to: ``sdpa``, or ``eager x 1, sdpa x 2``."""
    configs = {id(config): config for module in loaded.model.modules() if (config := getattr(module, "config", None))}
    used = Counter(str(getattr(config, "_attn_implementation", None) or "none") for config in configs.values())
    if len(used) == 1:
        return next(iter(used))
    return ", ".join(f"{name} x {count}" for name, count in sorted(used.items())) or "none"


def modes(loaded: Loaded) -> dict[str, str]:
    """Return how many modules train or recompute activations, and how many parameters are trained."""
    modules = list(loaded.model.modules())
    parameters = [parameter.requires_grad for parameter in loaded.model.parameters()]
    return {
        "mode.training": counted(len(loaded.trained) or sum(module.training for module in modules), "module"),
        "mode.gradient_checkpointing": counted(sum(map(_recomputes, modules)), "module"),
        "mode.requires_grad": f"{sum(parameters)} of {counted(len(parameters), 'parameter')}",
    }


def _recomputes(module: Any) -> bool:
    return bool(vars(module).get("gradient_checkpointing"))


def cache_settings(cache: Any, tokens: int, batch: int) -> dict[str, str]:
    """Return class, layers, dtype and bytes a token of what a generation keeps between its steps.

    ``tokens`` is the length that the cache was filled to; layers that keep no more than a window have fewer.
    """
    if cache is None:
        return {"cache.class": "none"}
    layers = list(getattr(cache, "layers", None) or ())
    kinds = Counter(type(layer).__name__ for layer in layers)
    tensors = [tensor for holder in layers or [cache] for tensor in _tensors(holder)]
    growing = [tensor for tensor in tensors if tensor.dim() == 4 and tensor.shape[-2] >= tokens]
    other = [tensor for tensor in tensors if not any(tensor is each for each in growing)]
    size = sum(tensor.numel() * tensor.element_size() // tensor.shape[-2] for tensor in growing)
    return {
        "cache.class": type(cache).__name__,
        "cache.layers": ", ".join(f"{name} x {count}" for name, count in sorted(kinds.items())) or "none",
        "cache.dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "none",
        "cache.bytes_per_token": str(size // batch),
        "cache.other_bytes": str(sum(tensor.numel() * tensor.element_size() for tensor in other) // batch),
    }


def _tensors(holder: Any) -> Iterator[Any]:
    import torch

    values = (
        holder if isinstance(holder, (list, tuple)) else vars(holder).values() if hasattr(holder, "__dict__") else ()
    )
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(list(value.values()))


def _generation_config(loaded: Loaded) -> Any:
    return getattr(loaded.model, "generation_config", None)


def _fields(prefix: str, content: Mapping[str, Any], places: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, value in content.items():
        # What is not set is as if it were not there.
        if name in _ORIGIN or value is None:
            continue
        full = f"{prefix}.{name}"
        if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
            yield from _fields(full, value, places)
        else:
            yield full, _text(value, places)


def _text(value: Any, places: tuple[str, ...]) -> str:
    if isinstance(value, str):
        text = next((value.replace(place, "<model>") for place in places if place and place in value), value)
    else:
        text = json.dumps(value, sort_keys=True, default=lambda item: str(item).removeprefix("torch."))
    return text if len(text) <= _LONG else f"digest {digest(text, 12)}"


def _constants(loaded: Loaded) -> dict[str, str]:
    """Return plain attributes of the modules by class: ``LlamaRMSNorm.variance_epsilon`` -> ``1e-06``."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for path, module in loaded.model.named_modules():
        for name, value in vars(module).items():
            if type(value) in _PLAIN and name not in _PLACE and not name.startswith("_"):
                found[f"{type(module).__name__}.{name}"][path] = _text(value, (loaded.job.checkpoint.path,))
    # A flag that is off everywhere is as if it were not there.
    return {name: _joined(values) for name, values in found.items() if set(values.values()) != {"false"}}


def _joined(values: Mapping[str, str]) -> str:
    """Return the one value of all places; of several, each with its count, those that are rare with their place."""
    counts = Counter(values.values())
    if len(counts) == 1:
        return next(iter(counts))
    if len(counts) > _VALUES:
        return f"{len(counts)} values, digest {digest(sorted(values.items()), 12)}"
    places = {value: path for path, value in values.items()}
    return ", ".join(
        f"{value} in {places[value]}" if count == 1 else f"{value} x {count}" for value, count in counts.most_common()
    )
