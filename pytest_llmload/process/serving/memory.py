"""Memory of a process and of all its descendants. All figures are in bytes."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.job import Device
from pytest_llmload.system import proc
from pytest_llmload.system.gpu_processes import memory_of
from pytest_llmload.system.process_tree import tree

_PROC = Path("/proc")
#: Errors of reading a process that ends meanwhile: it is counted as long as it exists.
_GONE = (FileNotFoundError, ProcessLookupError)


def settled(root: int) -> int:
    """Return the anonymous memory of the tree; pages that forks share are counted once."""
    total = 0
    for pid in tree(root):
        try:
            total += proc.shared_out(pid)
        except _GONE:
            continue
    return total


def peak(root: int) -> int:
    """Return the sum of the highest resident memory of each process of the tree, without files that are still mapped.

    The kernel records these peaks, so that none is missed. For several processes the sum is an upper bound: they need
    not have peaked at the same time, and memory that they share is counted for each.
    """
    total = 0
    for pid in tree(root):
        try:
            sizes = proc.status(pid)
            # A process that is just ending no longer has sizes.
            total += max(0, sizes.get("VmHWM", 0) - sizes.get("RssFile", 0))
        except _GONE:
            continue
    return total


def has_mapped(root: int, name: str) -> bool:
    """Return true if a process of the tree has mapped a file whose name contains ``name``."""
    for pid in tree(root):
        try:
            lines = (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except _GONE:
            continue
        if any(name in line.rpartition("/")[2] for line in lines):
            return True
    return False


def on_gpus(root: int, device: Device) -> tuple[dict[int, int], str]:
    """Return the tree's GPU memory by the driver, by each GPU's index among the load's; or why it is unknown."""
    import pynvml

    pids, found = set(tree(root)), {}
    try:
        pynvml.nvmlInit()
        for place, gpu in enumerate(device.gpus):
            own = memory_of(pids, pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
            if not own:
                return {}, (
                    f"the driver does not list any process of the server on GPU {place}: it is in a different PID "
                    "namespace, or does not use the GPU"
                )
            if not all(own):
                return {}, "the driver gives no figure for a process of the server"
            found[place] = sum(own)
    except pynvml.NVMLError as error:
        return {}, f"NVML: {error}"
    return found, ""
