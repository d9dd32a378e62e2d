"""Buffers that no checkpoint holds are what their class's constructor computes.

On the meta device it computes nothing: a loader that then takes memory for them, clears them or casts them leaves a
model whose weights are right and whose rotary frequencies, masks or scales are not.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted, plural
from pytest_llmload.worker.checks.problem_names import named, size_of
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import BUFFER, Held

CHECK = "buffers"
#: Sums in a different order, on a different device, are all that may differ.
_TOLERANCE = 1e-4


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare with a module of the same class that is constructed from the same config on the CPU.

    Of classes whose constructor needs more than a config nothing is known; they are counted in a note.
    """
    if loaded.shards is not None:
        # What shards compute is held against the output of the model loaded whole.
        return
    owned: dict[str, list[Held]] = {}
    for held in loaded.inventory.held:
        computed = held.role == BUFFER and not held.persistent and held.tensor is not None and held.device != "meta"
        # An adapter's buffers are judged with its file.
        if computed and held.tensor.is_floating_point() and not loaded.inventory.is_adapter(held):
            owned.setdefault(held.module, []).append(held)
    wrong: dict[str, list[Held]] = {}
    unknown: list[Held] = []
    for path, buffers in owned.items():
        # As a constructor runs under from_pretrained for what it computes: rotary frequencies are in 32 bit.
        constructed = cache(partial(_constructed, loaded.inventory.modules[path]))
        for held in buffers:
            expected = getattr(constructed(torch.float32), held.name, None)
            if not isinstance(expected, torch.Tensor) or expected.device.type == "meta":
                unknown.append(held)
                continue
            if expected.dtype != held.tensor.dtype:
                # A constructor that names no dtype computes in the one that the model is loaded in.
                again = getattr(constructed(held.tensor.dtype), held.name)
                expected = again if again.dtype == held.tensor.dtype else expected
            if difference := _difference(expected, held):
                wrong.setdefault(difference, []).append(held)
    for difference, found in wrong.items():
        yield Problem(
            CHECK,
            f"{counted(len(found), 'buffer is', 'buffers are')} not what the constructor of "
            f"{plural(len(found), 'its class', 'their classes')} computes: {difference}",
            named(found),
            size_of(found),
        )
    if unknown:
        loaded.notes.append(
            f"{counted(len(unknown), 'buffer')} that no checkpoint holds {plural(len(unknown), 'was', 'were')} not "
            f"compared: no config alone constructs {plural(len(unknown), 'its class', 'their classes')} "
            f"({', '.join(held.path for held in unknown[:3])}{' …' if len(unknown) > 3 else ''})"
        )


def _constructed(module: Any, dtype: torch.dtype) -> Any:
    """Return a new module of the same class, from the config that this one keeps; None if it takes more than that.

    ``dtype`` is the default that its constructor finds. It has no weights: a whole text model may own a buffer, and
    would be held a second time.
    """
    from accelerate import init_empty_weights

    config = getattr(module, "config", None)
    parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    named = [item for item in parameters if item.kind == item.POSITIONAL_OR_KEYWORD]
    if config is None or [item.name for item in named if item.default is item.empty] != ["config"]:
        return None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cpu"), init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
            return type(module)(config)
    finally:
        torch.set_default_dtype(before)


def _difference(expected: Any, held: Held) -> str:
    """Return how a buffer differs; empty if it does not. A buffer in 16 bit has the computed values, rounded."""
    values = held.tensor.detach().cpu()
    if values.shape != expected.shape:
        return f"shape {tuple(values.shape)}, not {tuple(expected.shape)}"
    if not bool(values.isfinite().all()) and bool(expected.isfinite().all()):
        return "they hold NaN or infinity"
    if values.dtype != expected.dtype:
        return f"{held.dtype}, not {str(expected.dtype).removeprefix('torch.')}"
    scale = float(expected.abs().max()) or 1.0
    if bool(((values - expected).abs() <= _TOLERANCE * scale).all()):
        return ""
    constant = values.numel() > 1 and bool((values == values.reshape(-1)[0]).all())
    return f"they are constant {float(values.reshape(-1)[0]):g}" if constant else "they differ"
