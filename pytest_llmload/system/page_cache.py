"""Whether a checkpoint's pages are in memory before it is loaded: warm and cold loads differ by a factor of five."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from pytest_llmload.core.job import COLD, UNCONTROLLED, WARM

_PROT_READ, _MAP_SHARED = 1, 1
#: Bytes read at once; mapped apart from the heap, so that no figure of the load sees them.
_CHUNK = 16 << 20
_FAILED = ctypes.c_void_p(-1).value
_NOT_RESIDENT = bytes(range(0, 256, 2))


def set_page_cache(directory: str, wanted: str) -> str:
    """Bring the weight files into memory (``warm``) or out of it (``cold``); what :func:`page_cache` finds then.

    Needs no privilege: POSIX_FADV_DONTNEED drops clean pages that nobody has mapped, so ``cold`` may fail on files that
    another process uses, and ``warm`` on files larger than the memory.
    """
    now = page_cache(directory)
    if wanted not in (now, UNCONTROLLED):
        for file in _files(directory):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                if wanted == WARM:
                    _read(descriptor)
                else:
                    # Pages that were never written to the disk are not dropped.
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
    """``warm`` where at least 99 % of the weight files' pages are resident, ``cold`` where at most 1 % are.

    ``uncontrolled`` in between, and where the kernel does not tell: mincore(2) answers truly only for files that the
    process owns or may write.
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
    """Resident pages and all pages of a file; None where the kernel refuses."""
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
        # The lowest bit of a page's byte is its residence; the others are reserved.
        return len(bytes(vector).translate(None, _NOT_RESIDENT)), pages
    finally:
        libc.munmap(address, size)
