"""The machines (nodes) that a load's ranks are spread over, as torchrun's own environment variables describe them."""

from __future__ import annotations

import os

from pytest_llmload.core.errors import MachineError


def nodes() -> int:
    """Return ``PET_NNODES``, which ``torchrun --nnodes`` reads too, or 1 if it is not set.

    Raises MachineError if it is not a number of machines.
    """
    text = os.environ.get("PET_NNODES", "1")
    count = text.partition(":")[0]
    if not count.isdecimal() or int(count) < 1:
        raise MachineError(f"PET_NNODES={text!r} is not a number of nodes: set it to 1 or more, or unset it")
    return int(count)


def local_size(world_size: int) -> int:
    """Return the number of ranks on this machine. Raises MachineError if the nodes cannot have equally many."""
    if world_size % nodes():
        raise MachineError(
            f"world_size={world_size} does not divide among {nodes()} nodes (PET_NNODES): use a multiple of {nodes()}"
        )
    return world_size // nodes()
