"""Which objects Python's garbage collector looks at."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

#: New objects after which the collector looks at them while libraries are imported; 700 by default in Python 3.12.
_RARELY = 10_000
#: True in a process that has frozen what it imported for good, and in those that are forked from it. The collector
#: counts its frozen objects one by one.
_is_frozen = False


def freeze() -> None:
    """Freeze all objects for as long as the process lives: no collection looks at them, or copies their pages."""
    global _is_frozen
    gc.collect()
    gc.freeze()
    _is_frozen = True


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Collect garbage less often meanwhile: what torch and transformers import stays.

    With the default threshold, collections take a fifth of the time of these imports. Without any, a process that has
    imported them is 10 MB larger.
    """
    threshold, *others = gc.get_threshold()
    # 0 is a collector that is switched off.
    gc.set_threshold(threshold and max(threshold, _RARELY), *others)
    try:
        yield
    finally:
        gc.set_threshold(threshold, *others)


@contextmanager
def existing_hidden() -> Iterator[None]:
    """Hide all existing objects from the garbage collector, unless the process has frozen what it imported.

    A full collection of all that the libraries keep takes as long as a small load, and would fall into some loads and
    not into others. ``gc.unfreeze`` knows all frozen objects only, and would undo :func:`freeze`.
    """
    if _is_frozen:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def all_listed() -> Iterator[None]:
    """Show frozen objects to ``gc.get_objects`` and ``gc.get_referrers``; then freeze all again in such a process."""
    gc.unfreeze()
    try:
        yield
    finally:
        if _is_frozen:
            gc.freeze()
