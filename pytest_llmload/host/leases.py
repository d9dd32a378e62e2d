"""Who may use which GPU: one load at a time, across xdist workers and runs on the same machine."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.host import hardware

_POLL = 0.5


class Lease:
    """Some GPUs, held until released. The locks are the kernel's: they end with their holder, however it dies."""

    def __init__(self, gpus: tuple[Gpu, ...] = (), locks: list[Any] | None = None) -> None:
        self.gpus = gpus
        self._locks = locks or []

    def release(self) -> None:
        while self._locks:
            self._locks.pop().release()


def lease(device: Device, count: int, *, wait_foreign: float, wait_lock: float) -> Lease:
    """``count`` free GPUs of the device; on a CPU run, an empty lease.

    Waits up to ``wait_lock`` seconds for other loads of this plugin and ``wait_foreign`` seconds for processes that
    are none of ours. Raises MachineError naming the holder.
    """
    if device.kind == "cpu":
        return Lease()
    folder = Path(tempfile.gettempdir()) / "pytest-llmload-gpus"
    folder.mkdir(mode=0o1777, exist_ok=True)
    deadline = time.monotonic() + wait_lock
    held = _lock(device, count, folder)
    while held is None:
        if time.monotonic() > deadline:
            raise MachineError(f"{count} of {len(device.gpus)} GPUs are wanted, and other loads hold them")
        time.sleep(_POLL)
        held = _lock(device, count, folder)
    deadline = time.monotonic() + wait_foreign
    for gpu in held.gpus:
        while users := hardware.holders(gpu):
            if time.monotonic() > deadline:
                held.release()
                raise MachineError(
                    f"{gpu.name} ({gpu.uuid}) is in use by {'; '.join(users)}: figures taken beside it would not "
                    "hold; --llm-wait-gpu SECONDS waits for it"
                )
            time.sleep(_POLL)
    return held


def _lock(device: Device, count: int, folder: Path) -> Lease | None:
    from filelock import FileLock, Timeout

    gpus: list[Gpu] = []
    locks: list[Any] = []
    for gpu in device.gpus:
        if len(gpus) == count:
            break
        lock = FileLock(folder / f"{gpu.uuid}.lock", mode=0o666)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        gpus.append(gpu)
        locks.append(lock)
    found = Lease(tuple(gpus), locks)
    if len(gpus) == count:
        return found
    found.release()
    return None
