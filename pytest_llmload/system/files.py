"""Write files so that a reader sees the old text or the new one, never a part of either."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` (UTF-8) by way of a temporary file beside it; missing folders are made.

    A link is followed and the file's permissions are kept. Raises OSError; the old file is then as it was, unless the
    disk fails once the new one has taken its place.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Hidden and with a suffix of its own: what a killed process leaves behind is never read as a result. By chance and
    # not by pid, which writers of one volume in two containers share; and short, since the target's name may not be.
    temporary = target.with_name(f".llmload-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
    except BaseException:
        # Ctrl-C too: the folder may be a committed one.
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Make a rename in a folder durable, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
