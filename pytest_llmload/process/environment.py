"""What a figure depends on: versions, hardware and settings, from an allow-list. No path, no name, no secret."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from pytest_llmload.core.environment_entries import IMPORTED, INSTALLED, NEEDED, libraries
from pytest_llmload.core.job import Job
from pytest_llmload.process import job_strategies
from pytest_llmload.system import allocator

#: What torch's allocator for the GPU is set with; of several the first counts.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def environment(job: Job) -> dict[str, str]:
    """The environment of this process: entries of ``core/environment_entries.py``, but for what is not here."""
    import torch

    found = {"python": platform.python_version(), **_versions(job)}
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
    # What runs on the CPU is as fast as the threads are many.
    threads = "" if job.device.kind == "cuda" else f"{found['threads']} threads"
    host = (found.get("gpu"), found["cpu"], threads, found.get("driver", "").split(".")[0])
    found["host"] = "/".join(part for part in host if part)
    found["malloc"] = allocator.setting()
    if settings := [os.environ[name] for name in _ALLOCATOR if os.environ.get(name)]:
        found["allocator"] = settings[0]
    found["loader_threads"] = str(_loader_threads())
    return found


def _versions(job: Job) -> dict[str, str]:
    """Of the libraries that a load depends on; one that is not installed is left out."""
    needed = {package for strategy in job_strategies.strategies(job) for package in strategy.needs(job.spec)}
    names = [
        *libraries(INSTALLED),
        *(name for name in libraries(IMPORTED) if name in sys.modules),
        *(name for name in libraries(NEEDED) if name in needed),
    ]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """As ``/proc/cpuinfo`` names it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _loader_threads() -> int:
    """Threads that transformers reads a checkpoint with (5: min(4, CPUs), unless switched off; 4: one)."""
    from transformers import modeling_utils

    if os.environ.get("HF_DEACTIVATE_ASYNC_LOAD", "").upper() in ("1", "ON", "YES", "TRUE"):
        return 1
    if not hasattr(modeling_utils, "convert_and_load_state_dict_in_model"):
        return 1
    from transformers.core_model_loading import GLOBAL_WORKERS

    return int(GLOBAL_WORKERS)
