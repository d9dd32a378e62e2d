"""Who may use which GPU: one load at a time, across xdist workers and runs on the same machine."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.host.loads import hardware

#: Seconds between two looks.
_POLL = 0.5


class Lease:
    """Some GPUs, held until released. The locks are the kernel's: they end with their holder, however it dies."""

    def __init__(self, gpus: tuple[Gpu, ...], locks: contextlib.ExitStack) -> None:
        self.gpus = gpus
        self._locks = locks

    def release(self) -> None:
        self._locks.close()


def lease(device: Device, count: int, *, wait_foreign: float, wait_lock: float) -> Lease:
    """``count`` GPUs of the device that nobody uses; on a CPU run, an empty lease.

    Waits up to ``wait_lock`` seconds for other loads of this plugin and, where processes that are none of ours leave
    too few GPUs, ``wait_foreign`` seconds for those. Raises MachineError naming the holders.
    """
    if device.kind == "cpu":
        return Lease((), contextlib.ExitStack())
    folder = _folder()
    lock_deadline = time.monotonic() + wait_lock
    foreign_deadline: float | None = None
    while True:
        held, foreign = _free(device, count, folder)
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
                    f"{used}: figures taken beside it would not hold; --llm-wait-gpu SECONDS waits for it"
                )
        time.sleep(_POLL)


def _folder() -> Path:
    """Where runs of all users on this machine keep their locks. Raises MachineError."""
    folder = Path(tempfile.gettempdir()) / "pytest-llmload-gpus"
    try:
        folder.mkdir()
        # In a call of its own: the umask takes bits off what mkdir is given.
        folder.chmod(0o1777)
    except FileExistsError:
        pass
    except OSError as error:
        raise _cannot_lock(folder, error) from error
    return folder


def _cannot_lock(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"GPUs cannot be locked for this run's loads in {path}: {error.strerror or error}; every user of the GPUs must "
        "be able to write there (mode 1777)"
    )


def _free(device: Device, count: int, folder: Path) -> tuple[Lease | None, dict[Gpu, list[str]]]:
    """The first ``count`` GPUs that neither a load of ours nor anybody else uses, or None; and who uses the others.

    Raises MachineError where there can be no lock or the driver does not answer; nothing is locked then.
    """
    from filelock import FileLock, Timeout

    gpus: list[Gpu] = []
    foreign: dict[Gpu, list[str]] = {}
    with contextlib.ExitStack() as locks:
        for gpu in device.gpus:
            if len(gpus) == count:
                break
            lock = FileLock(folder / f"{gpu.uuid}.lock", mode=0o666)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            except OSError as error:
                raise _cannot_lock(folder, error) from error
            locks.callback(lock.release)
            if users := hardware.holders(gpu):
                foreign[gpu] = users
                lock.release()
            else:
                gpus.append(gpu)
        if len(gpus) == count:
            return Lease(tuple(gpus), locks.pop_all()), foreign
    return None, foreign
