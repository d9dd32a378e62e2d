"""Find processes and their descendants.

Written by hand instead of with psutil, whose import takes 25 ms of CPU time while a load's process may take 100 ms to
start: only two columns of ``/proc`` are needed. Zombies are included, since callers wait for them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_ZOMBIE = "Z"


def descendants(root: int, keep: Collection[int] = (), *, zombies: bool = True) -> dict[int, int]:
    """Return each descendant of a process -> its parent, except the processes ``keep`` and their descendants.

    Descendants that have ended but were not waited for are included unless ``zombies`` is false.
    """
    parents = _parents(zombies)
    found: dict[int, int] = {}
    new = {root}
    while new:
        more = {pid: parent for pid, parent in parents.items() if parent in new and pid not in keep}
        found |= more
        new = set(more)
    return found


def tree(root: int) -> list[int]:
    """Return the pids of a process and of its living descendants."""
    return [root, *descendants(root, zombies=False)]


def _parents(zombies: bool) -> dict[int, int]:
    """Return every visible process -> its parent (proc(5), ``stat``: fields 3 and 4)."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold blanks and brackets.
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            # It has ended meanwhile, so it is not a child of any process now.
            continue
        if zombies or state != _ZOMBIE:
            parents[int(entry.parent.name)] = int(parent)
    return parents
