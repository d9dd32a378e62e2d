"""Processes and what they have started.

By hand and not by psutil, whose import takes 25 ms of CPU where a load's process may take 100 ms to start: what is
needed is two columns of ``/proc``, zombies among them, since those are what is waited for.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

_ZOMBIE = "Z"


def descendants(root: int, keep: Collection[int] = (), *, zombies: bool = True) -> dict[int, int]:
    """Return the descendants of a process -> their parents, but for the processes ``keep`` and what is theirs.

    Those that have ended and were not waited for are among them unless ``zombies`` is false.
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
    """Return a process and its descendants that are alive."""
    return [root, *descendants(root, zombies=False)]


def _parents(zombies: bool) -> dict[int, int]:
    """Return every process that can be seen -> its parent (proc(5), ``stat``: fields 3 and 4)."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold blanks and brackets.
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            # It has ended meanwhile, and is not a child of any process any more.
            continue
        if zombies or state != _ZOMBIE:
            parents[int(entry.parent.name)] = int(parent)
    return parents
