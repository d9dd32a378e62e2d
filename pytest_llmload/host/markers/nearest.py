"""Select the marks that apply to a test."""

from __future__ import annotations

from collections.abc import Container, Iterator

import pytest


def nearest(node: pytest.Item, name: str) -> list[pytest.Mark]:
    """Return the marks of one name on the nearest node that has any, in the order they stand in the file."""
    found: list[pytest.Mark] = []
    owner = None
    for holder, mark in node.iter_markers_with_node(name):
        if owner is not None and holder is not owner:
            break
        owner = holder
        found.append(mark)
    inherited = _inherited(owner.obj, name) if isinstance(owner, pytest.Class) else ()
    # Decorators apply from the bottom up.
    return [mark for mark in reversed(found) if not any(mark is other for other in inherited)]


def _inherited(cls: type, name: str) -> list[pytest.Mark]:
    """Return the marks of a test class that come from classes above the nearest one that has any.

    pytest puts all of them on one node.
    """
    levels = []
    for each in cls.__mro__:
        written = each.__dict__.get("pytestmark", ())
        listed = written if isinstance(written, (list, tuple)) else [written]
        marks = [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in listed]
        levels.append([mark for mark in marks if mark.name == name])
    nearest_level, *above = [level for level in levels if level] or [[]]
    return [mark for level in above for mark in level if not any(mark is own for own in nearest_level)]


def limit_marks(item: pytest.Item, name: str) -> list[pytest.Mark]:
    """Return the marks of a limit that hold for an item: those of its parameters, else those of the nearest node."""
    callspec = getattr(item, "callspec", None)
    own = [mark for mark in callspec.marks if mark.name == name] if callspec is not None else []
    return own or nearest(item, name)


def parameter_marks(item: pytest.Item, names: Container[str]) -> Iterator[pytest.Mark]:
    """Yield the marks of these names that a ``pytest.param(marks=…)`` of another parametrize gives an item.

    They are applied too late to change a load.
    """
    callspec = getattr(item, "callspec", None)
    if callspec is not None:
        yield from (mark for mark in callspec.marks if mark.name in names)
