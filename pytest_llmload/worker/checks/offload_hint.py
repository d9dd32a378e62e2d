"""Explain why a model raises whose weights are offloaded."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from pytest_llmload.worker.model.loaded import Loaded

#: Folders of libraries that only pass a call on to a module's own code.
_PASSED_THROUGH = ("/torch/", "/accelerate/")


def offload_hint(loaded: Loaded, error: Exception) -> str:
    """Return which class reads offloaded weights where accelerate has not loaded them; empty if that is not the cause.

    accelerate's hooks hold a module's weights in place for its own forward. A class that reads a child's weights, or
    calls other methods of it, finds tensors on the meta device.
    """
    if "meta" not in str(error) or not any(held.offloaded for held in loaded.inventory.held):
        return ""
    reader = _innermost_module(error)
    if reader is None:
        return ""
    return (
        f"accelerate loads an offloaded module's weights for its own forward only, and {type(reader).__name__} reads "
        "some at a different moment: the blocks that contain it cannot be offloaded"
    )


def _innermost_module(error: Exception) -> Any:
    """Return the module whose own code is the innermost in a traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = (frame for frame in reversed(frames) if not any(part in frame.f_code.co_filename for part in _PASSED_THROUGH))
    owners = (frame.f_locals.get("self") for frame in own)
    return next((owner for owner in owners if isinstance(owner, torch.nn.Module)), None)
