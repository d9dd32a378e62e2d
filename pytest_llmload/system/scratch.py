"""Folders that live as long as a process: what a killed one left behind is removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

#: What a load keeps on disk, the logs of a run's processes, and what the workers of pytest-xdist tell each other.
LOAD, LOGS, XDIST = "llmload-scratch-", "pytest-llmload-logs-", "pytest-llmload-xdist-"
_LOCK = "lock"


class Scratch:
    """A temporary folder (in ``TMPDIR``), locked for as long as this process lives.

    A process may end without running exit handlers; whoever makes the next folder of that ``prefix`` removes those that
    nobody locks.
    """

    def __init__(self, prefix: str) -> None:
        base = Path(tempfile.gettempdir())
        for old in base.glob(f"{prefix}*"):
            _remove_if_free(old)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        # Under its name only once it is locked: without, the folder is unfinished, and nobody's to remove.
        new = self.path / f"{_LOCK}.new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / _LOCK)
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
