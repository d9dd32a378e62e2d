"""Folders that live as long as a load: what a killed process left behind is removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "llmload-scratch-"
_LOCK = "lock"


class Scratch:
    """A temporary folder (in ``TMPDIR``), locked for as long as this process lives.

    A load process may end without running exit handlers; whoever makes the next folder removes those that nobody locks.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        for old in base.glob(f"{_PREFIX}*"):
            _remove_if_free(old)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "files").mkdir()

    @property
    def files(self) -> Path:
        return self.path / "files"

    def close(self) -> None:
        """Remove the folder. May be called twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path)
            os.close(self._lock)
            self._lock = -1


def _remove_if_free(folder: Path) -> None:
    """Remove another's folder unless it is locked, unfinished (no lock file yet), or another user's."""
    with contextlib.suppress(OSError):
        lock = os.open(folder / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
