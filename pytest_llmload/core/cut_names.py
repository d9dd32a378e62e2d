"""Name a model of which only the first layers are loaded: its baselines never mix with the whole model's."""

from __future__ import annotations

import re

_NAME = re.compile(r"(.+)@([1-9]\d*)-layers")


def cut_name(name: str, layers: int) -> str:
    """Return the name, in ids and baselines, of the first ``layers`` layers of a model."""
    return f"{name}@{layers}-layers"


def split_name(name: str) -> tuple[str, int | None]:
    """Return the name of the whole model, and the number of layers that a name states; None if all are loaded."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)
