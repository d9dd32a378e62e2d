"""Find code that reads an offloaded weight at a moment when accelerate has not loaded it.

accelerate's hooks hold a module's weights in place for its own forward. A class that reads a child's weights, or calls
other methods of it, finds tensors on the meta device. Most operators raise then; torch's ``linear`` of a CPU tensor
and a meta weight returns memory as it was found.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.model.generation import first_forward
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "offloaded"
#: Folders of libraries that only pass a call on to a module's own code.
_PASSED_THROUGH = ("/torch/", "/accelerate/", "/pytest_llmload/")


def check(loaded: Loaded) -> Iterator[Problem]:
    """Run the model once more and name the modules that compute with weights on meta; called after every figure."""
    if not any(held.offloaded for held in loaded.inventory.held):
        return
    mode = _Mixed()
    with mode:
        first_forward(loaded)
    paths = {id(module): path for path, module in loaded.inventory.modules.items()}
    readers = {paths[id(module)]: module for module in mode.modules if id(module) in paths}
    if readers:
        path, reader = next(iter(readers.items()))
        yield Problem(
            CHECK,
            f"{path} computes with weights that are offloaded and not loaded at that moment: its output is undefined",
            tuple(readers),
            hint=_why(reader),
        )


def hint(loaded: Loaded, error: Exception) -> str:
    """Return which class reads offloaded weights where accelerate has not loaded them; empty if that is not the cause
    of an error.
    """
    if "meta" not in str(error) or not any(held.offloaded for held in loaded.inventory.held):
        return ""
    reader = _innermost_module(frame for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))))
    return "" if reader is None else _why(reader)


class _Mixed(TorchDispatchMode):  # type: ignore[misc]
    """Notes the modules whose code has an operator compute values from a tensor on meta and one that holds values."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {value.device.type for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        if "meta" in devices and len(devices) > 1 and getattr(result, "device", torch.device("meta")).type != "meta":
            self.modules.append(_innermost_module(frame for frame, _ in traceback.walk_stack(None)))
        return result


def _why(reader: Any) -> str:
    return (
        f"accelerate loads an offloaded module's weights for its own forward only, and {type(reader).__name__} reads "
        "some at a different moment: the blocks that contain it cannot be offloaded"
    )


def _innermost_module(frames: Iterable[FrameType]) -> Any:
    """Return the module whose own code is the innermost of frames, which are given from there outwards."""
    own = (frame for frame in frames if not any(part in frame.f_code.co_filename for part in _PASSED_THROUGH))
    owners = (frame.f_locals.get("self") for frame in own)
    return next((owner for owner in owners if isinstance(owner, torch.nn.Module)), None)
