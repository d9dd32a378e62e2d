"""Memory of a process and of all that it has started. All figures in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_llmload.core.job import Device
from pytest_llmload.system import proc
from pytest_llmload.system.process_tree import tree

_PROC = Path("/proc")
#: What a process is asked for may end in the middle: it was counted as long as it was there.
_GONE = (FileNotFoundError, ProcessLookupError)


def settled(root: int) -> int:
    """Anonymous memory of the tree; pages that forks share are counted once."""
    total = 0
    for pid in tree(root):
        try:
            total += proc.shared_out(pid)
        except _GONE:
            continue
    return total


def peak(root: int) -> int:
    """Highest resident memory of each process of the tree, files apart that are still mapped, summed.

    Kept by the kernel, so that nothing is missed; of several processes it is an upper bound: they need not have peaked
    together, and what they share is in each.
    """
    total = 0
    for pid in tree(root):
        try:
            sizes = proc.status(pid)
            # A process that is just ending has no sizes any more.
            total += max(0, sizes.get("VmHWM", 0) - sizes.get("RssFile", 0))
        except _GONE:
            continue
    return total


def has_mapped(root: int, name: str) -> bool:
    """Whether a process of the tree has a file mapped whose name contains ``name``."""
    for pid in tree(root):
        try:
            lines = (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except _GONE:
            continue
        if any(name in line.rpartition("/")[2] for line in lines):
            return True
    return False


def on_gpus(root: int, device: Device) -> tuple[dict[int, int], str]:
    """GPU memory of the tree by the driver, by the GPU's place among the load's; or why there is no figure."""
    import pynvml

    pids, found = set(tree(root)), {}
    try:
        pynvml.nvmlInit()
        for place, gpu in enumerate(device.gpus):
            rows: list[Any] = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
            own = [row.usedGpuMemory for row in rows if row.pid in pids]
            if not own:
                return {}, f"the driver lists no process of the server on GPU {place}: another PID namespace, or none"
            if not all(own):
                return {}, "the driver gives no figure for a process of the server"
            found[place] = sum(own)
    except pynvml.NVMLError as error:
        return {}, f"NVML: {error}"
    return found, ""
