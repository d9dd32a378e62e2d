"""Machines that a load's ranks are spread over, as torchrun's own environment variables say it."""

from __future__ import annotations

import os

from pytest_llmload.core.errors import MachineError


def nodes() -> int:
    """``PET_NNODES``, which ``torchrun --nnodes`` reads too; one where nobody says otherwise."""
    return int(os.environ.get("PET_NNODES", "1").partition(":")[0])


def local_size(world_size: int) -> int:
    """Ranks on this machine. MachineError where the ranks do not divide among the machines."""
    if world_size % nodes():
        raise MachineError(f"world_size={world_size} does not divide among {nodes()} nodes (PET_NNODES)")
    return world_size // nodes()
