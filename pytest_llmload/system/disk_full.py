"""Whether an exception means that a disk is full, whichever library raised it."""

from __future__ import annotations

import errno
import os

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an exception, or one that it was raised from, says that a disk or a quota is full."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        # Rust's libraries, safetensors among them, raise classes of their own with the system's words.
        if isinstance(each, OSError) and each.errno in _FULL:
            return True
        if any(isinstance(arg, str) and os.strerror(number) in arg for arg in each.args for number in _FULL):
            return True
        each = each.__cause__
    return False
