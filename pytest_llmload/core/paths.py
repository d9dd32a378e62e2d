"""Read the paths that users write."""

from __future__ import annotations

from pathlib import Path

from pytest_llmload.core.quoting import quoted


def path_of(text: str) -> Path:
    """Return the path that a user wrote, with ``~`` expanded; it need not exist.

    Raises ValueError for a path that cannot be examined: an unknown home directory, a name that is too long, or a
    folder that this process may not enter.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError:
        raise ValueError(f"{quoted(text)} begins with a home directory that this machine does not know") from None
    except OSError as error:
        raise ValueError(f"{quoted(text)} is not a path that can be read: {error.strerror}") from None
    return path
