"""Adapters that change the weights below them when they are attached, such as PiSSA and OLoRA.

PEFT computes the change again at every load. So the changed weight is compared with the one that PEFT's own functions
make from the checkpoint's weight in a model of that one layer.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

#: Settings of an adapter that reach beyond a single layer.
_BEYOND = {"modules_to_save": None, "layer_replication": None, "trainable_token_indices": None, "bias": "none"}
#: The largest difference of two results, relative to the change itself, that counts as rounding.
_SAME = 0.02


def is_rewritten(value: Any, original: Any, layer: Any, path: str, config: Any, name: str) -> bool | None:
    """Return true if ``value`` is the weight that PEFT makes from the base's weight ``original``.

    Return None if it cannot be checked, since PEFT draws random numbers at every load.

    Args:
        value: The weight in the model, dense.
        original: The checkpoint's weight.
        layer: The layer of PEFT around the module that has the weight.
        path: Path of the module in the model without the adapter.
        config: The adapter's configuration.
        name: The adapter's name.
    """
    original = original.to(value.device, value.dtype)
    base = layer.get_base_layer()
    first, second = (_attached_to(original, base, path, config, name, seed) for seed in (0, 1))
    change = float((first.float() - original.float()).norm())
    if not change:
        return False
    if float((first.float() - second.float()).norm()) > _SAME * change:
        return None
    return float((first.float() - value.float()).norm()) <= _SAME * change


def rewritten(original: Any, path: str, config: Any, name: str) -> Any:
    """Return the weight that PEFT makes from a quantised one before it quantises it again, dense, in fp32.

    Args:
        original: The quantised weight of the base, dequantised: outputs x inputs.
        path: Path of the module in the model without the adapter.
        config: The adapter's configuration.
        name: The adapter's name.
    """
    base = torch.nn.Linear(original.shape[1], original.shape[0], bias=False, device="meta")
    return _attached_to(original.float(), base, path, config, name, 0)


def _attached_to(original: Any, like: Any, path: str, config: Any, name: str, seed: int) -> Any:
    """Return the weight below a new adapter in a model that has one layer only, a copy of ``like``."""
    from peft import inject_adapter_in_model

    base = copy.deepcopy(like)
    base.weight = torch.nn.Parameter(original.clone(), requires_grad=False)
    shell = torch.nn.Module()
    parent = shell
    *parents, leaf = path.split(".")
    for part in parents:
        parent.add_module(part, torch.nn.Module())
        parent = parent.get_submodule(part)
    parent.add_module(leaf, base)
    alone = copy.deepcopy(config)
    for setting, value in _BEYOND.items():
        if hasattr(alone, setting):
            setattr(alone, setting, value)
    devices = [original.device] if original.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        inject_adapter_in_model(alone, shell, name)
    return shell.get_submodule(path).get_base_layer().weight.detach()
