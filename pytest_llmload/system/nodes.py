"""Machines that a load's ranks are spread over, as torchrun's own environment variables say it."""

from __future__ import annotations

import os

from pytest_llmload.core.errors import MachineError


def nodes() -> int:
    """``PET_NNODES``, which ``torchrun --nnodes`` reads too; one where nobody says otherwise.

    Raises MachineError where it is no number of machines.
    """
    text = os.environ.get("PET_NNODES", "1")
    count = text.partition(":")[0]
    if not count.isdecimal() or int(count) < 1:
        raise MachineError(f"PET_NNODES={text!r} is no number of nodes: set it to 1 or more, or unset it")
    return int(count)


def local_size(world_size: int) -> int:
    """Ranks on this machine. MachineError where the ranks do not divide among the machines."""
    if world_size % nodes():
        raise MachineError(f"world_size={world_size} does not divide among {nodes()} nodes (PET_NNODES)")
    return world_size // nodes()
