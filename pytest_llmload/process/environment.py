"""The environment that figures depend on: versions, hardware and settings, without paths, host names or secrets."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from pytest_llmload.core.environment_entries import IMPORTED, INSTALLED, libraries
from pytest_llmload.core.job import Job
from pytest_llmload.process import job_strategies
from pytest_llmload.system import allocator

#: Environment variables that configure torch's GPU allocator; the first one that is set counts.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def environment(job: Job, quantisers: Iterable[str] = ()) -> dict[str, str]:
    """Return this process's values of the entries in ``core/environment_entries.py``; unknown values are left out.

    ``quantisers`` are the packages that quantised the loaded model's weights.
    """
    import torch

    found = {"python": platform.python_version(), **_versions(job, quantisers)}
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
    if torch.version.hip:
        found["rocm"] = str(torch.version.hip)
    if libc := " ".join(filter(None, platform.libc_ver())):
        found["libc"] = libc
    found["cpu_isa"] = torch.backends.cpu.get_cpu_capability()
    found["cpu"] = cpu_model()
    if job.device.kind == "cuda":
        found["gpu"] = torch.cuda.get_device_name(0)
        found["driver"] = job.device.driver
    found["threads"] = str(torch.get_num_threads())
    # The speed of a CPU run depends on the number of threads.
    threads = "" if job.device.kind == "cuda" else f"{found['threads']} threads"
    host = (found.get("gpu"), found["cpu"], threads, found.get("driver", "").split(".")[0])
    found["host"] = "/".join(part for part in host if part)
    found["malloc"] = allocator.setting()
    if settings := [os.environ[name] for name in _ALLOCATOR if os.environ.get(name)]:
        found["allocator"] = settings[0]
    found["loader_threads"] = str(_loader_threads())
    return found


def _versions(job: Job, quantisers: Iterable[str]) -> dict[str, str]:
    """Return the versions of the libraries that a load depends on; one that is not installed is left out."""
    imported = libraries(IMPORTED)
    names = [
        *libraries(INSTALLED),
        *imported,
        *(name for strategy in job_strategies.strategies(job) for name in strategy.needs(job.spec)),
        *quantisers,
    ]
    names = [name for name in dict.fromkeys(names) if name not in imported or name in sys.modules]
    return {name: version for name in names if (version := version_of(name)) is not None}


@functools.cache
def version_of(package: str) -> str | None:
    """Return the version of an installed package; None of others. Its metadata is parsed once in a process."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse_versions() -> None:
    """Make the versions of the libraries of any load known, also to the processes that are forked from this one."""
    for name in libraries(INSTALLED) + libraries(IMPORTED):
        version_of(name)


def cpu_model() -> str:
    """Return the CPU's model as ``/proc/cpuinfo`` names it, else the machine's architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _loader_threads() -> int:
    """Return the number of threads that transformers reads a checkpoint with.

    Release 5 uses min(4, CPUs), unless that is switched off; release 4 uses one.
    """
    from transformers import modeling_utils

    if os.environ.get("HF_DEACTIVATE_ASYNC_LOAD", "").upper() in ("1", "ON", "YES", "TRUE"):
        return 1
    if not hasattr(modeling_utils, "convert_and_load_state_dict_in_model"):
        return 1
    from transformers.core_model_loading import GLOBAL_WORKERS

    return int(GLOBAL_WORKERS)
