"""Control whether a checkpoint's pages are in memory before a load: warm and cold loads differ by a factor of five."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from pytest_llmload.core.job import COLD, UNCONTROLLED, WARM

_PROT_READ, _MAP_SHARED = 1, 1
#: Bytes read at once, into memory that is mapped outside the heap, so that it does not affect the load's figures.
_CHUNK = 16 << 20
_FAILED = ctypes.c_void_p(-1).value
_NOT_RESIDENT = bytes(range(0, 256, 2))


def set_page_cache(directory: str, wanted: str) -> str:
    """Read the weight files into memory (``warm``) or drop them (``cold``); return what :func:`page_cache` finds then.

    Needs no privileges: POSIX_FADV_DONTNEED drops clean pages that no process has mapped, so ``cold`` may fail on files
    that another process uses, and ``warm`` on files larger than the memory.
    """
    now = page_cache(directory)
    if wanted not in (now, UNCONTROLLED):
        for file in _files(directory):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                if wanted == WARM:
                    _read(descriptor)
                else:
                    # The kernel does not drop pages that are not written to the disk yet.
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        now = page_cache(directory)
    return now


def _read(descriptor: int) -> None:
    buffer = mmap.mmap(-1, _CHUNK)
    with buffer:
        while os.readv(descriptor, [buffer]):
            pass


def _files(directory: str) -> list[Path]:
    return sorted(Path(directory).glob("*.safetensors"))


def page_cache(directory: str) -> str:
    """Return ``warm`` if at least 99 % of the weight files' pages are resident, ``cold`` if at most 1 % are.

    Returns ``uncontrolled`` in between, and if the kernel does not tell: mincore(2) answers truly only for files that
    the process owns or may write.
    """
    resident = pages = 0
    for file in _files(directory):
        if not (os.access(file, os.W_OK) or file.stat().st_uid == os.geteuid()):
            return UNCONTROLLED
        counted = _resident(file)
        if counted is None:
            return UNCONTROLLED
        resident, pages = resident + counted[0], pages + counted[1]
    if not pages:
        return UNCONTROLLED
    share = resident / pages
    return WARM if share >= 0.99 else COLD if share <= 0.01 else UNCONTROLLED


def _resident(file: Path) -> tuple[int, int] | None:
    """Return the number of resident pages and of all pages of a file; None if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    size = file.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    if not pages:
        return 0, 0
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        return None
    try:
        vector = (ctypes.c_ubyte * pages)()
        if libc.mincore(address, size, vector) != 0:
            return None
        # The lowest bit of a page's byte says whether it is resident; the others are reserved.
        return len(bytes(vector).translate(None, _NOT_RESIDENT)), pages
    finally:
        libc.munmap(address, size)
