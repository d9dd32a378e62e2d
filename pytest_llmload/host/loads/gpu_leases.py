"""Lease GPUs to loads: one load at a time, across xdist workers and runs of all users on the same machine."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Sequence

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.host.loads import hardware

#: Seconds between two attempts.
_POLL = 0.5
#: The prefix of the names of all locks.
_NAME = "pytest-llmload"


class Lease:
    """GPUs that are held until released. The kernel keeps the locks: they end when their last holder ends or dies."""

    def __init__(self, gpus: tuple[Gpu, ...], locks: Sequence[socket.socket] = ()) -> None:
        self.gpus = gpus
        self._locks = list(locks)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Return the locks as file descriptors: a process that receives them holds the GPUs too."""
        return tuple(lock.fileno() for lock in self._locks)

    def release(self) -> None:
        """Give the GPUs back, unless another process holds the locks too."""
        while self._locks:
            self._locks.pop().close()


def lease(device: Device, count: int, *, wait_foreign: float, wait_lock: float) -> Lease:
    """Return a lease on ``count`` unused GPUs of the device; on a CPU run, an empty lease.

    Waits up to ``wait_lock`` seconds for other loads of this plugin and, if processes that do not belong to this plugin
    leave too few GPUs, ``wait_foreign`` seconds for those. Raises MachineError naming the holders.
    """
    if device.kind == "cpu":
        return Lease(())
    lock_deadline = time.monotonic() + wait_lock
    foreign_deadline: float | None = None
    while True:
        held, foreign = _free(device, count)
        if held is not None:
            return held
        now = time.monotonic()
        if not foreign or len(device.gpus) - len(foreign) >= count:
            foreign_deadline = None
            if now >= lock_deadline:
                raise MachineError(f"{count} of {len(device.gpus)} GPUs are wanted, and other loads hold them")
        else:
            foreign_deadline = foreign_deadline or now + wait_foreign
            if now >= foreign_deadline:
                used = "; ".join(f"{gpu.name} ({gpu.uuid}) is in use by {'; '.join(foreign[gpu])}" for gpu in foreign)
                raise MachineError(
                    f"{used}: measurements taken while it runs would be invalid; --llm-wait-gpu SECONDS waits for it"
                )
        time.sleep(_POLL)


def _taken(gpu: Gpu) -> socket.socket | None:
    """Return the lock of a GPU, taken for this process; None if another process of this machine has it.

    The lock is a name among the kernel's abstract sockets (unix(7)) rather than a file in a folder that all users
    share: every user can take it and no user can prepare it, TMPDIR does not change it, and it is free once its holder
    is gone.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0{_NAME}/{gpu.uuid}")
    except OSError as error:
        lock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise MachineError(f"{gpu.name} ({gpu.uuid}) cannot be locked: {error.strerror or error}") from error
    return lock


def _free(device: Device, count: int) -> tuple[Lease | None, dict[Gpu, list[str]]]:
    """Return the first ``count`` GPUs that are not used by a load or another process, or None; and the others' users.

    Raises MachineError if locks are impossible or the driver does not answer; then no GPU is locked.
    """
    gpus: list[Gpu] = []
    foreign: dict[Gpu, list[str]] = {}
    locks: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for gpu in device.gpus:
            if len(gpus) == count:
                break
            lock = _taken(gpu)
            if lock is None:
                continue
            undo.callback(lock.close)
            if users := hardware.holders(gpu):
                foreign[gpu] = users
                lock.close()
            else:
                gpus.append(gpu)
                locks.append(lock)
        if len(gpus) == count:
            undo.pop_all()
            return Lease(tuple(gpus), locks), foreign
    return None, foreign
