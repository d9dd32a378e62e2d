"""Hold locks of the kernel, which end with the process that holds them, however it dies.

filelock is not used here since it locks files only: a lock file would lie among committed files, or in a TMPDIR that
other writers of the same volume do not share. Locking the folder itself avoids the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

#: Seconds between two attempts.
_POLL = 0.01
#: Errors of file systems that cannot lock folders: NFS locks only what is open for writing, which a folder never is.
_NO_FOLDERS = (errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
#: The file that is locked instead of such a folder; its holder removes it again.
LOCK_FILE = ".llmload.lock"


@contextlib.contextmanager
def folder_lock(folder: Path, seconds: float) -> Iterator[None]:
    """Hold a folder exclusively among all callers, also in other containers that share its volume.

    A missing folder is made. Raises TimeoutError after ``seconds``, and OSError if the folder cannot be made or its
    file system locks neither folders nor files.
    """
    deadline = time.monotonic() + seconds
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle, file = _opened(folder)
        except FileNotFoundError:
            # Another process has removed the folder since it was made.
            continue
        try:
            while not _taken(handle):
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{folder} has been locked for {seconds:g} s")
                time.sleep(_POLL)
            if not _is_still(handle, file or folder):
                continue
            try:
                yield
            finally:
                if file is not None:
                    file.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _opened(folder: Path) -> tuple[int, Path | None]:
    """Open what to lock: the folder, or a file in it (returned with its path) if folders cannot be locked."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _taken(handle)
    except OSError as error:
        os.close(handle)
        if error.errno not in _NO_FOLDERS:
            raise
    else:
        return handle, None
    file = folder / LOCK_FILE
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), file


def _taken(handle: int) -> bool:
    """Lock an open file or folder if it is free, and return whether this process holds it now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(handle: int, path: Path) -> bool:
    """Return whether a path still names the open file: its last holder may have removed it during the wait."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat() if path.name == LOCK_FILE else path.stat())
    except FileNotFoundError:
        return False
