"""Set up a load's process: let it die with its parent, write to a log, and read what the kernel knows of it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

from pytest_llmload.system.process_tree import descendants

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MADV_POPULATE_WRITE = 23


def die_with_parent(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, even if the parent is killed with SIGKILL.

    Linux ties this to the *thread* that started the process, and fork clears it, so every process calls this itself.
    ``parent`` is the expected parent's pid; if the parent is gone already, the process ends at once.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Have the kernel make this process the parent of its orphaned descendants, so that it can wait for them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(keep: Collection[int] = (), sessions: Collection[int] = ()) -> None:
    """Kill this process's descendants, except ``keep`` and their descendants, and wait for their end.

    Orphans whose session is one of ``sessions`` stay too. Once orphans are adopted, none escapes: the children of a
    killed process are this process's children in the next round. A killed process holds its GPU until the kernel has
    finished with it, so this waits for that.
    """
    killed = [os.getpid()]
    while killed:
        killed = []
        family = descendants(os.getpid(), keep)
        for pid in family:
            # A process that runs as a different user cannot be killed, and is left alone.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) not in sessions:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
        for pid in killed:
            if family[pid] == os.getpid():
                os.waitpid(pid, 0)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def log_to(path: str) -> None:
    """Send stdout and stderr to a file, with stacks on fatal signals and on SIGUSR1."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # A process that was exec'ed with a pipe would buffer what it prints, but the log must be complete when it dies.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Stacks go to the log also while stderr is another file.
    own = os.dup(2)
    # The end of a log must be short: it shows the thread that crashed, or after a hang all threads.
    faulthandler.enable(own, all_threads=False)
    faulthandler.register(signal.SIGUSR1, own, all_threads=True)


def own_pages() -> bool:
    """Copy every writable private page that is shared with the parent, before something is timed.

    The kernel copies a page that a fork shares with its parent on the first write to it, and Python writes to an
    object's page even when it reads the object: a few thousand copies within a load of 0.2 s, which a process that
    imported everything itself does not make. Return False if the kernel is not able to (before Linux 5.14).
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, *_, name = f"{line} ".split(" ", 5)
        if access != "rw-p" or name.strip() == "[stack]":
            continue
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if madvise(begin, end - begin, _MADV_POPULATE_WRITE) != 0 and ctypes.get_errno() == errno.EINVAL:
            return False
    return True


def thread_count() -> int:
    """Return the number of this process's threads, native ones (OpenMP, OpenBLAS) included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def open_gpu_files() -> list[str]:
    """Return the device files of GPUs that this process holds open; using CUDA or NVML opens some."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue  # the descriptor of this listing itself
        if target.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")):
            found.append(target)
    return found
