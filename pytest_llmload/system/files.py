"""Write files so that a reader sees either the old text or the new text, never a part of one."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` (UTF-8) by way of a temporary file next to it; missing folders are made.

    A link is followed and the file's permissions are kept. Raises OSError; the old file is then unchanged, unless the
    disk fails after the new one has replaced it.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is hidden and has its own suffix, so that a killed process's file is never read as a result. It is
    # random, since writers in two containers may share a volume and a pid, and short, since the target's may be long.
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
        # On Ctrl-C too: the folder may be a committed one.
        temporary.unlink(missing_ok=True)
        raise
    _sync(target.parent)


def _sync(folder: Path) -> None:
    """Make a rename in a folder durable, if its file system is able to."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
