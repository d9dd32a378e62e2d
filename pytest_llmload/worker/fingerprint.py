"""Whether a test's function changed the model that other tests share."""

from __future__ import annotations

from typing import Any

_State = tuple[object, ...]


def fingerprint(model: Any) -> frozenset[_State]:
    """What an edit of the model moves: each tensor's place, type, storage and version, each module's class and mode.

    torch counts in-place changes of a tensor in ``_version``; edits through ``.data`` are not counted and not seen.
    """
    state: set[_State] = set()
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state.add((name, type(module).__qualname__, module.training, hooks))
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            version = -1 if tensor.is_inference() else tensor._version
            state.add((kind, name, str(tensor.dtype), str(tensor.device), tensor.data_ptr(), version))
    return frozenset(state)
