"""How many threads the work on files may take."""

from __future__ import annotations

import os


def workers() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
