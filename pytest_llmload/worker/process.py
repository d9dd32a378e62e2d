"""Being a load process: dying with the parent, writing to a log, telling what the kernel knows."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, even if the parent is killed with SIGKILL.

    Linux ties this to the *thread* that started the process, and fork clears it: every process asks for itself.
    ``parent`` is the expected parent's pid; if it is gone already, the process ends at once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def log_to(path: str) -> None:
    """Send stdout and stderr to a file, with stacks on fatal signals and on SIGUSR1."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    # A process that was exec'ed with a pipe would buffer what it prints; the tail must be there when it dies.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # The tail of a log is short: of a crash, the thread that crashed; of a hang, all.
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def thread_count() -> int:
    """Threads of this process, native ones (OpenMP, OpenBLAS) included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def open_gpu_files() -> list[str]:
    """Device files of GPUs that this process holds open: after CUDA or NVML was touched, there are some."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue  # the descriptor of this very listing
        if target.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")):
            found.append(target)
    return found
