"""A rank's place among the others, from the environment that torch elastic gives it."""

from __future__ import annotations

import importlib
import os
from datetime import timedelta

from pytest_llmload.core.job import Job

#: A rank that waits this long for another one is in a hang; the pytest process ends it long before.
_PATIENCE = timedelta(hours=6)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def nodes() -> int:
    """Machines that the ranks are spread over; torchrun's own variables say so (``PET_NNODES=2``)."""
    return int(os.environ.get("PET_NNODES", "1").partition(":")[0])


def local_size(world_size: int) -> int:
    """Ranks on this machine. ValueError where the ranks do not divide among the machines."""
    if world_size % nodes():
        raise ValueError(f"world_size={world_size} does not divide among {nodes()} nodes (PET_NNODES)")
    return world_size // nodes()


def backend(job: Job) -> str:
    return "nccl" if job.device.kind == "cuda" else "gloo"


def settle(job: Job) -> None:
    """What must be set in a rank's process before any library looks at it."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size(job.spec.world_size)))
    if nodes() == 1:
        # By name, a machine may resolve to an address that nobody answers on.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if job.device.kind == "cuda":
        # The one GPU that this rank sees is its first.
        os.environ["LOCAL_RANK"] = "0"


def join(job: Job) -> None:
    """Meet the other ranks: connections are made, and what is needed is imported, before the clock starts."""
    import torch

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend(job), timeout=_PATIENCE)
    importlib.import_module("pytest_llmload.worker.parallel.ranks")
    torch.distributed.all_reduce(torch.ones(1, device="cuda:0" if job.device.kind == "cuda" else "cpu"))
