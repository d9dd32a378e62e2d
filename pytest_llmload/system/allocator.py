"""The C library's allocator, made repeatable while a model is loaded and left alone while it runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

#: glibc serves larger blocks by mmap and gives them back at once. Without this setting, its heap keeps an arbitrary
#: part of freed weights, and host memory varies by 40 % between loads. On a CPU, generating takes 1.3 times as long
#: with it and does not need it: activations come and go, and :func:`trim` gives back what the heap keeps of them before
#: the settled memory is measured.
MMAP_THRESHOLD = 64 << 10
#: The values at which glibc's own adjustment ends: the largest threshold, and twice that for the top of the heap.
_SETTLED_MMAP_THRESHOLD = 32 << 20
_SETTLED_TRIM_THRESHOLD = 2 * _SETTLED_MMAP_THRESHOLD
#: mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Variables by which users tune or replace the allocator; their loads are measured with that.
USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def setting() -> str:
    """Return the allocator's setting unless it is pinned: ``system``, or the names of the variables the user set."""
    names = [name for name in USERS if os.environ.get(name)]
    return f"by {', '.join(names)}" if names else "system"


def pin() -> str:
    """Have blocks above :data:`MMAP_THRESHOLD` bytes mapped one by one, unless the user tunes; return the setting."""
    stands = setting()
    mallopt = _mallopt()
    if stands != "system" or mallopt is None or not mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD):
        return stands
    return f"mmap_threshold={MMAP_THRESHOLD}"


def unpin() -> None:
    """Undo :func:`pin`: set the thresholds that glibc itself reaches in a process that frees large blocks."""
    mallopt = _mallopt()
    if setting() == "system" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SETTLED_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _SETTLED_TRIM_THRESHOLD)


def trim() -> None:
    """Have glibc give back every empty page of its heap (malloc_trim(3)), unless the user tunes."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if setting() == "system" and malloc_trim is not None:
        malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    """Return glibc's mallopt(3); None if the C library does not have it."""
    return getattr(ctypes.CDLL(None), "mallopt", None)


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``, from malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    ]


def handed_out() -> int | None:
    """Return the bytes that the program has allocated in glibc's heaps and mapped blocks; None without mallinfo2(3).

    glibc sums all arenas (malloc/malloc.c, ``__libc_mallinfo2``).
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)
