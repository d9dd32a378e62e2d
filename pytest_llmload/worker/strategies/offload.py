"""Part of the model on the CPU and on disk, brought in for each forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.strategies.base import Strategy
from pytest_llmload.worker.strategies.max_memory import inferred_map, load_with_map

if TYPE_CHECKING:
    from pytest_llmload.worker.loaded import Loaded


class Offload(Strategy):
    """accelerate's hooks: a third of the blocks stays on the GPU, a third goes to the CPU, a third to disk.

    On a CPU run half of the blocks goes to disk. ``device_map`` or ``max_memory`` in the spec decide instead.
    """

    name = "offload"
    summary = "CPU and disk offload through accelerate's hooks."
    fields: ClassVar[dict[str, Any]] = {"strategy": "offload"}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        if job.spec.device_map is not None or job.spec.max_memory:
            return load_with_map(job, kwargs, inferred_map(job, dict(job.spec.max_memory)))
        return load_with_map(job, kwargs, _block_map(job))

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Offloaded bytes are found where accelerate keeps them; the forward and generating prove that it runs."""
        offloaded = [held for held in loaded.inventory.held if held.offloaded]
        size = sum(held.nbytes for held in offloaded)
        on_disk = sum(held.nbytes for held in offloaded if held.device == "disk")
        if not size:
            return [Problem(self.name, "nothing is offloaded: no hook holds a weight")]
        loaded.notes.append(f"offloaded: {format_bytes(size - on_disk)} to the CPU, {format_bytes(on_disk)} to disk")
        return []


def _block_map(job: Job) -> dict[str, Any]:
    """Blocks in order over the devices, the last on disk; all else stays on the main device."""
    from pytest_llmload.worker.skeleton import skeleton

    model = skeleton(job)
    classes = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in classes]
    if not blocks:
        raise ValueError(f"{type(model).__name__} names no blocks that could be offloaded (_no_split_modules)")
    devices: list[Any] = [0, "cpu", "disk"] if job.device.kind == "cuda" else ["cpu", "disk"]
    # From the end, so that a model with a single block still offloads it.
    places = {path: devices[-1 - index * len(devices) // len(blocks)] for index, path in enumerate(reversed(blocks))}
    found: dict[str, Any] = {}
    _cover(model, "", places, devices[0], found)
    return found


def _cover(module: Any, path: str, places: dict[str, Any], main: Any, found: dict[str, Any]) -> None:
    """Entries for a module: its block's place, or the main device for the largest part that holds no block."""
    if path in places:
        found[path] = places[path]
    elif not any(block.startswith(f"{path}." if path else "") for block in places):
        found[path] = main
    else:
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            found[f"{path}.{name}" if path else name] = main
        for name, child in module.named_children():
            _cover(child, f"{path}.{name}" if path else name, places, main, found)
