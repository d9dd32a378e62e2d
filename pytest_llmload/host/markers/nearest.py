"""Which marks of a test count, and the values that they list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from pytest_llmload.host.markers.signatures import LOAD_MARKERS

_PARAMETER_SET = type(pytest.param())


def nearest(node: pytest.Item, name: str) -> list[pytest.Mark]:
    """The marks of one name on the nearest node that has any, in the order they stand in the file."""
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
    """Marks that a test class has from classes above the nearest one that has any; pytest puts all on one node."""
    levels = []
    for each in cls.__mro__:
        written = each.__dict__.get("pytestmark", ())
        listed = written if isinstance(written, (list, tuple)) else [written]
        marks = [mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in listed]
        levels.append([mark for mark in marks if mark.name == name])
    nearest_level, *above = [level for level in levels if level] or [[]]
    return [mark for level in above for mark in level if not any(mark is own for own in nearest_level)]


def limit_marks(item: pytest.Item, name: str) -> list[pytest.Mark]:
    """The marks of a limit that hold for an item: those of its parameters, else those of the nearest node."""
    callspec = getattr(item, "callspec", None)
    own = [mark for mark in callspec.marks if mark.name == name] if callspec is not None else []
    return own or nearest(item, name)


def foreign_marks(item: pytest.Item) -> Iterator[pytest.Mark]:
    """Load markers inside somebody else's ``pytest.param(marks=…)``: applied too late to change the load."""
    callspec = getattr(item, "callspec", None)
    if callspec is not None:
        yield from (mark for mark in callspec.marks if mark.name in LOAD_MARKERS)


def unpacked(args: Iterable[Any], where: str) -> Iterator[tuple[Any, str | None, tuple[pytest.Mark, ...]]]:
    """Values of a marker; each may be a ``pytest.param(value, marks=…, id=…)``. Raises UsageError for more in one."""
    for arg in args:
        if isinstance(arg, _PARAMETER_SET):
            if len(arg.values) != 1:
                values = ", ".join(map(repr, arg.values))
                raise pytest.UsageError(f"{where}: pytest.param({values}): one value in each")
            marks = tuple(mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in arg.marks)
            yield arg.values[0], (arg.id if isinstance(arg.id, str) else None), marks
        else:
            yield arg, None, ()
