"""The C library's allocator, made repeatable while a model is loaded and left alone while it runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

#: glibc serves larger blocks by mmap and gives them back at once. Without it its heap keeps what it likes of freed
#: weights, and host memory varies by 40 % between loads. Generating takes 1.3 times as long with it on a CPU, and does
#: not need it: activations come and go, and :func:`trim` takes what the heap keeps of them out of what is settled.
MMAP_THRESHOLD = 64 << 10
#: Where glibc's own adjustment ends: the largest threshold, and twice that for giving back the top of the heap.
_SETTLED_MMAP_THRESHOLD = 32 << 20
_SETTLED_TRIM_THRESHOLD = 2 * _SETTLED_MMAP_THRESHOLD
#: mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: A user who tunes the allocator, or takes another one, is measured with that.
USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def setting() -> str:
    """How the allocator stands unless it is pinned: ``system``, or what the user has set."""
    names = [name for name in USERS if os.environ.get(name)]
    return f"by {', '.join(names)}" if names else "system"


def pin() -> str:
    """Have blocks above :data:`MMAP_THRESHOLD` bytes mapped one by one, unless the user tunes; how it stands now."""
    stands = setting()
    mallopt = _mallopt()
    if stands != "system" or mallopt is None or not mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD):
        return stands
    return f"mmap_threshold={MMAP_THRESHOLD}"


def unpin() -> None:
    """Undo :func:`pin`: the thresholds that glibc's own adjustment reaches in a process that frees large blocks."""
    mallopt = _mallopt()
    if setting() == "system" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SETTLED_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _SETTLED_TRIM_THRESHOLD)


def trim() -> None:
    """Have glibc give back every page of its heap that holds nothing (malloc_trim(3)), unless the user tunes."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if setting() == "system" and malloc_trim is not None:
        malloc_trim(0)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's mallopt(3); None where the C library has none."""
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
    """Return the bytes that the program holds of glibc's heaps and of blocks mapped for it; None without mallinfo2(3).

    glibc sums all arenas (malloc/malloc.c, ``__libc_mallinfo2``).
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)
