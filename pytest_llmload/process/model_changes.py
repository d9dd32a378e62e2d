"""Detect whether a test's function changed the model that other tests share."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch

from pytest_llmload.worker.model.tensors import leaves, local_part

_State = tuple[object, ...]
#: The most bytes of a tensor that are compared.
_BYTES = 32
#: Attributes that a call of the model may set for the next one.
_MADE_BY_CALLS = frozenset({"_compiled_call"})


def fingerprint(model: Any) -> frozenset[_State]:
    """Return a set of facts that changes if a test edits the model.

    It has each tensor's name, type, storage, version, ``requires_grad``, and some of its values: torch counts in-place
    changes in ``_version``, but not those through ``.data``. It has each module's class, mode, hooks and replaced
    functions, and the model's configs and torch's own defaults. An edit through ``.data`` of a few values, or of a
    quantisation state, is not detected.
    """
    state: set[_State] = set()
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state.add((name, type(module).__qualname__, module.training, hooks, *_replaced(module)))
    tensors: list[Any] = []
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            version = -1 if tensor.is_inference() else tensor._version
            place = (str(tensor.dtype), str(tensor.device), tensor.data_ptr(), version, tensor.requires_grad)
            state.add((kind, name, *place))
            tensors.append(tensor.detach())
    state |= {("values", *sample) for sample in _samples(tensors)}
    state |= {(name, _settings(getattr(model, name, None))) for name in ("config", "generation_config")}
    state.add(("torch", str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled()))
    return frozenset(state)


def _replaced(module: Any) -> Iterator[tuple[str, int]]:
    """Yield the functions that a module has as its own attributes, such as a replaced ``forward``, with their ids."""
    for name, value in vars(module).items():
        # A wrapper's call leaves a method of the model behind, as an attribute under its own name.
        # A bound functools.partial has no name of its own.
        named = isinstance(value, MethodType) and getattr(value.__func__, "__name__", "") == name
        own = named and isinstance(value.__self__, torch.nn.Module)
        if callable(value) and not own and name not in _MADE_BY_CALLS and not isinstance(value, torch.nn.Module):
            yield name, id(value)


def _samples(tensors: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield each device with a digest of some bytes of all its tensors, which come to the host in one copy."""
    parts: dict[str, list[Any]] = defaultdict(list)
    for tensor in tensors:
        for leaf in leaves(local_part(tensor)):
            if leaf.device.type != "meta" and leaf.numel() and leaf.is_contiguous():
                raw = leaf.reshape(-1).view(torch.uint8)
                step = max(1, raw.numel() // _BYTES)
                # Views. An odd step meets all bytes of a value, and all columns of a matrix.
                parts[str(leaf.device)].append(raw[step // 3 :: step | 1][:_BYTES])
    for device, values in parts.items():
        yield device, hashlib.blake2b(torch.cat(values).cpu().numpy().tobytes(), digest_size=16).hexdigest()


def _settings(config: Any) -> str:
    """Return a config's content, with the attention implementation, which the config does not export."""
    if config is None:
        return ""
    content = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    return repr((content, getattr(config, "_attn_implementation", None)))
