"""Where weights go when a test names a strategy but no map: derived from the model's shape, so that it repeats."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pytest_llmload.core.job import Job

MIB = 1 << 20
#: Bytes of a GPU's memory that no tensor gets: CUDA's context and the kernels it loads.
CONTEXT = 600 << 20
#: Share of a GPU's memory that a map may fill: what transformers itself leaves on one GPU.
DEVICE_SHARE = 0.9
#: Part of the weights that fits a device under the default of ``max_memory``.
MAX_MEMORY_SHARE = 0.6
#: Parts of the weights that the default of ``offload`` keeps on the device that computes, and on the host.
COMPUTE_SHARE, HOST_SHARE = 0.5, 0.25


@dataclass(frozen=True)
class Blocks:
    """Modules that a map places as a whole (decoder layers, embeddings, head), in the order of the forward pass."""

    #: Module -> bytes of what it holds; a tied weight counts where it comes first.
    sizes: Mapping[str, int]
    #: Those that hold a weight which stands in other blocks too.
    shared: frozenset[str] = frozenset()

    @property
    def largest(self) -> int:
        """Return the bytes of the largest block; 0 if there is none."""
        return max(self.sizes.values(), default=0)


@dataclass(frozen=True)
class Placement:
    """How a strategy places the weights of a load whose test gives no map of modules.

    With neither a name nor a map of its own, everything is on one device.
    """

    #: The name by which transformers infers the map: ``auto``, ``balanced`` …; empty if it infers none.
    inferred: str = ""
    #: Returns the map of a job from the blocks of its model.
    default_map: Callable[[Job, Blocks], dict[str, int | str]] | None = None
    #: Returns the limits of a job that gives none, in bytes, from the bytes of all weights and of the largest block.
    #: Without it, they are those of :func:`device_limits`.
    default_limits: Callable[[Job, int, int], dict[int | str, int]] | None = None

    #: True if it leaves weights on the CPU or in files on purpose.
    offloads: bool = False

    @property
    def divides(self) -> bool:
        """Return true if it may put weights on several devices, or into files."""
        return bool(self.inferred) or self.default_map is not None


def device_limits(job: Job) -> dict[int | str, int]:
    """Return the bytes that each device may take in a map that the libraries infer.

    These are the spec's ``max_memory``, else limits from the devices' total memory. As the libraries want it, GPUs are
    numbers and come first. Without limits the libraries take what is free at that moment, and the map is a different
    one on every run.
    """
    if job.spec.max_memory:
        given = dict(job.spec.max_memory)
        numbers: dict[int | str, int] = {int(name): size for name, size in given.items() if name.isdigit()}
        return numbers | {name: size for name, size in given.items() if not name.isdigit()}
    found: dict[int | str, int] = {index: int(gpu.total * DEVICE_SHARE) for index, gpu in enumerate(job.device.gpus)}
    return found | {"cpu": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def default_max_memory(job: Job, planned_bytes: int, largest_block: int = 0) -> dict[int | str, int]:
    """Return limits in bytes of ``strategy("max_memory")`` without a map, in whole MiB.

    Each GPU gets room for 60 % of ``planned_bytes`` (all weights), the CPU for the rest; on a CPU run the CPU gets 60 %
    and the rest goes to disk. accelerate keeps room for the largest block free on the device that computes, through
    which offloaded ones pass; ``largest_block`` is added for it, as long as something is left to offload.
    """
    wanted = min(int(planned_bytes * MAX_MEMORY_SHARE) + largest_block, planned_bytes - 1)
    share = max(wanted // MIB, 1) * MIB
    if job.device.kind != "cuda":
        return {"cpu": share}
    whole = -(-(planned_bytes + largest_block) // MIB) * MIB
    return {**dict.fromkeys(range(max(job.spec.gpu_count, 1)), share), "cpu": whole}


def default_offload_map(job: Job, blocks: Blocks) -> dict[str, int | str]:
    """Return the device map of ``strategy("offload")`` without a map: every block on the GPU, the CPU or the disk.

    In the order of the forward pass, half of the weights stay on the device that computes; then a quarter goes to the
    CPU and the rest to disk (on a CPU run all of it). Blocks without weights, and those after the last decoder layer
    (norm, head, and what is tied to the embedding), stay on the device that computes; so do blocks that share weights,
    which can be in one place only. If no layer lies past the half, the last one goes to disk whole.
    """
    main: int | str = 0 if job.device.kind == "cuda" else "cpu"
    total, before = sum(blocks.sizes.values()), 0
    layers = [
        name
        for name, size in blocks.sizes.items()
        if size and name not in blocks.shared and any(part.isdigit() for part in name.split("."))
    ]
    found: dict[str, int | str] = {}
    for name, size in blocks.sizes.items():
        middle = before + size / 2
        before += size
        if name not in layers or middle <= total * COMPUTE_SHARE:
            found[name] = main
        elif main == 0 and middle <= total * (COMPUTE_SHARE + HOST_SHARE):
            found[name] = "cpu"
        else:
            found[name] = "disk"
    if layers and set(found.values()) == {main}:
        last = _layer(layers[-1])
        found |= {name: "disk" for name in layers if _layer(name) == last}
    return found


def _layer(name: str) -> str:
    """Return a block's path up to its first number: that of the layer that it is a part of."""
    parts = name.split(".")
    return ".".join(parts[: 1 + next(index for index, part in enumerate(parts) if part.isdigit())])


def lookup(device_map: Mapping[str, int | str], name: str, default: str) -> int | str:
    """Return where a map puts a module or tensor: its own entry, else that of the nearest module above it."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name, default)
