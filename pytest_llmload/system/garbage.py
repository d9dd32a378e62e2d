"""Which objects Python's garbage collector looks at."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def existing_hidden() -> Iterator[None]:
    """Hide all existing objects from the garbage collector, unless the process has already frozen what it imported.

    A full collection of all that the libraries keep takes as long as a small load, and would fall into some loads and
    not into others. ``gc.unfreeze`` knows all frozen objects only: objects that the process froze for good stay frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def all_listed() -> Iterator[None]:
    """Show frozen objects to ``gc.get_objects`` and ``gc.get_referrers``; freeze all again if some were."""
    are_frozen = bool(gc.get_freeze_count())
    gc.unfreeze()
    try:
        yield
    finally:
        if are_frozen:
            gc.freeze()
