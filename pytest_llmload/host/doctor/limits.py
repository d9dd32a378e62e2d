"""Check the limits of the kernel and a container on a process: shared memory, open files, address space, memory."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from pytest_llmload.core.units import format_bytes
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding
from pytest_llmload.host.loads import hardware

SHARED = Path("/dev/shm")
#: Shared memory that ranks need: NCCL and torch's queues fail with 64 MiB, which is what Docker gives.
_ENOUGH = 512 << 20
#: Open files of a load that maps a checkpoint of some hundred shards.
_FILES = 1024


def shared_memory() -> Iterator[Finding]:
    """Yield whether /dev/shm is large enough for loads of several processes."""
    if not SHARED.is_dir():
        yield Finding(
            "shm", ERROR, f"{SHARED} is not there: loads of several processes fail", "docker run --shm-size=8g …"
        )
        return
    usage = shutil.disk_usage(SHARED)
    text = f"{SHARED} has {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if usage.free < _ENOUGH:
        text += f", and loads of several processes need {format_bytes(_ENOUGH)}"
        yield Finding("shm", WARNING, text, "docker run --shm-size=8g …   # or: --ipc=host")
    else:
        yield Finding("shm", FINE, text)


def ulimits() -> Iterator[Finding]:
    """Yield the limits of this process that a load runs into."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        higher = "unlimited" if hard == resource.RLIM_INFINITY else str(min(hard, 65_536))
        yield Finding(
            "ulimit", WARNING, f"a process may open {soft} files, loads may need {_FILES}", f"ulimit -n {higher}"
        )
    for name, limit, flag in (("address space", resource.RLIMIT_AS, "-v"), ("data", resource.RLIMIT_DATA, "-d")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            text = f"a process may have {format_bytes(soft)} of {name}: CUDA and mapped checkpoints need far more"
            yield Finding("ulimit", ERROR, text, f"ulimit {flag} unlimited")
    yield Finding("memory", FINE, f"{format_bytes(hardware.host_memory())} of memory for this process")
