"""A rank's place among the others, from the environment that torch elastic gives it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from pytest_llmload.core.job import Job
from pytest_llmload.system.nodes import local_size, nodes

#: A rank that waits this long for another one is in a hang; the pytest process ends it long before.
_PATIENCE = timedelta(hours=6)
#: Environment variable: the file through which the ranks of one machine meet.
STORE = "LLMLOAD_RANKS_STORE"


def rank() -> int:
    """Return this process's rank, as torch elastic sets it; 0 in a load of one process."""
    return int(os.environ.get("RANK", "0"))


def answers() -> bool:
    """Return whether this process answers for all ranks of its machine.

    It is then the first of them, or the only process.
    """
    return rank() % int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 0


def backend(job: Job) -> str:
    """Return the name of torch.distributed's backend for the load's device."""
    return "nccl" if job.device.kind == "cuda" else "gloo"


def settle(job: Job) -> None:
    """Set what must be set in a rank's process before any library looks at it."""
    import torch

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size(job.spec.world_size)))
    if nodes() == 1:
        # By name, a machine may resolve to an address that no process answers on.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if job.device.kind == "cuda":
        # The one GPU that this rank sees is its first.
        os.environ["LOCAL_RANK"] = "0"


def agreed(job: Job, wish: bool) -> bool:
    """Return whether every rank wishes so; a process without ranks has its wish.

    Returns on all ranks at about the same time. For what each would decide by its own clock or its own files: what they
    do next they do together, or they wait for each other for ever.
    """
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return wish
    vote = torch.tensor([float(wish)], device=_device(job))
    torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MIN)
    return bool(vote.item())


def join(job: Job) -> None:
    """Meet the other ranks: connections are made before the clock starts."""
    import torch

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend(job), timeout=_PATIENCE, **_meeting())
    torch.distributed.all_reduce(torch.ones(1, device=_device(job)))


def _meeting() -> dict[str, Any]:
    """Return where the ranks meet: a file on one machine, what torch elastic has set on several."""
    import torch

    if nodes() > 1 or STORE not in os.environ:
        return {}
    size = int(os.environ["WORLD_SIZE"])
    return {"store": torch.distributed.FileStore(os.environ[STORE], size), "rank": rank(), "world_size": size}


def _device(job: Job) -> str:
    return "cuda:0" if job.device.kind == "cuda" else "cpu"
