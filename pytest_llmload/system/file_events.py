"""Note which files of a folder are opened, also by native code that Python's hooks do not see (Linux's inotify(7))."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_IN_OPEN = 0x20
#: Fields of an event: wd, mask, cookie, length of the name that follows.
_EVENT = struct.Struct("iIII")
_BUFFER = 1 << 16
#: Process and descriptor of each inotify instance that no watch uses any more. To close one takes some 10 ms, in which
#: the kernel waits until nobody can see its watches; to remove the watches does not.
_unused: list[tuple[int, int]] = []


class OpenedFiles:
    """A watch that notes which of some files are opened. Files are identified by inode, so links are followed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Watch ``paths``; ``complaint`` gives the reason if the system lacks inotify or has no watch left."""
        self.complaint = ""
        self._names: dict[int, str] = {}
        self._opened: set[str] = set()
        self._libc = libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "inotify_init1"):
            self._file, self.complaint = -1, "this system does not have inotify"
            return
        # A forked process shares its parent's instance, and would take the parent's events.
        if _unused and _unused[-1][0] == os.getpid():
            _, self._file = _unused.pop()
        else:
            self._file = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for path in paths:
            watch = libc.inotify_add_watch(self._file, os.fsencode(path), _IN_OPEN) if self._file >= 0 else -1
            if watch < 0:
                self.complaint = f"{path.name} cannot be watched: {os.strerror(ctypes.get_errno())}"
                break
            self._names[watch] = path.name

    def close(self) -> list[str]:
        """Return the names of the files that were opened, sorted, and stop watching; may be called again."""
        if self._file >= 0:
            self._drain()
            for watch in self._names:
                self._libc.inotify_rm_watch(self._file, watch)
            _unused.append((os.getpid(), self._file))
            self._file = -1
        return sorted(self._opened)

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self._file, _BUFFER)
            except BlockingIOError:
                return
            place = 0
            while place < len(data):
                watch, _, _, length = _EVENT.unpack_from(data, place)
                place += _EVENT.size + length
                if watch in self._names:
                    self._opened.add(self._names[watch])
