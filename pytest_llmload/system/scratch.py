"""Make temporary folders that live as long as a process; the next process removes those of a killed one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from pytest_llmload.core.errors import MachineError

#: Prefixes of a load's files on disk, of the logs of a run's processes, and of files that pytest-xdist's workers share.
LOAD, LOGS, XDIST = "llmload-scratch-", "pytest-llmload-logs-", "pytest-llmload-xdist-"
_LOCK = "lock"


class Scratch:
    """A temporary folder (in ``TMPDIR``), locked for as long as this process lives.

    A process may end without running exit handlers, so making a folder removes those of the same ``prefix`` that no
    process locks.
    """

    def __init__(self, prefix: str) -> None:
        """Make the folder. Raises MachineError if that is not possible."""
        remove_abandoned(prefix)
        try:
            self._make(prefix)
        except OSError as error:
            place = error.filename or "TMPDIR does not name a folder that can be written"
            raise MachineError(f"cannot make a temporary folder: {error.strerror or error} ({place})") from None

    def _make(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        try:
            self._fill()
        except OSError:
            shutil.rmtree(self.path)
            raise

    def _fill(self) -> None:
        # The lock file gets its name only once it is locked: a folder without one is unfinished, and is not removed.
        new = self.path / f"{_LOCK}.new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / _LOCK)
        (self.path / "files").mkdir()

    @property
    def files(self) -> Path:
        """Return the subfolder for the process's files."""
        return self.path / "files"

    def close(self) -> None:
        """Remove the folder. May be called twice."""
        if self._lock >= 0:
            shutil.rmtree(self.path)
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(prefix: str) -> None:
    """Remove the folders with this prefix that killed processes have left behind."""
    with contextlib.suppress(OSError):
        for old in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_if_free(old)


def _remove_if_free(folder: Path) -> None:
    """Remove another process's folder unless it is locked, unfinished (no lock file yet), or another user's."""
    with contextlib.suppress(OSError):
        lock = os.open(folder / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
