"""Parse paths as people write them."""

from __future__ import annotations

from pathlib import Path


def path_of(text: str) -> Path:
    """A path as people write it, perhaps with ``~``. ValueError for one that nobody can look at: of no known home, too
    long, or in a folder that is closed to us.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise ValueError(f"{text!r} begins with a home directory that this machine does not know") from None
    except OSError as error:
        raise ValueError(f"{text!r} is no path that can be read: {error.strerror}") from None
    return path
