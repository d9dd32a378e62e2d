"""Ask the GPU's driver how much memory processes use. NVML opens device files: a process that forks must not ask."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def memory_of(pids: Collection[int], handle: Any) -> list[int]:
    """Return the bytes of a GPU for each of the processes ``pids`` that the driver lists; 0 if it gives no figure.

    In a container the driver may list none of them, or the numbers of a different PID namespace.

    Args:
        pids: Numbers of processes, as this process sees them.
        handle: NVML's handle of the GPU; NVML must be initialised.

    Raises pynvml.NVMLError if the driver does not tell.
    """
    import pynvml

    rows: list[Any] = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return [int(row.usedGpuMemory or 0) for row in rows if row.pid in pids]
