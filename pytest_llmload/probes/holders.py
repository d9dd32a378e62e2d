"""What keeps objects alive, as far as Python's garbage collector knows: an attribute, a name, a container."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from types import CellType, FrameType, ModuleType
from typing import Any

#: The beginning of a name that says little.
_KEY = "key"
#: Containers whose own name is searched for, and the most items of one.
_CONTAINERS, _SANE = (list, tuple, set, dict), 1_000_000


def holders(values: Sequence[Any]) -> list[str]:
    """Return what keeps each object alive: ``attribute cache of Server``, ``the list ourapp.SEEN``, ``ourapp.MODEL``.

    To find what refers to an object, the collector goes through all objects of the process, for as long as a small
    load takes. It is asked three times for all values: who holds them, who holds these, and whose attributes those are.
    """
    known = _Referrers()
    known.find(values)
    holding = [each for value in values for each in known.of(value) if _is_container(each) or _is_plain_dict(each)]
    known.find(holding)
    known.find([owner for each in holding for owner in known.of(each) if _is_plain_dict(owner)])
    return [_holder(value, known) for value in values]


class _Referrers:
    """The objects that refer to some objects; each is asked for once."""

    def __init__(self) -> None:
        self._found: dict[int, list[Any]] = {}

    def find(self, values: Iterable[Any]) -> None:
        """Find what refers to these objects, in one search through all objects of the process."""
        new = {id(value): value for value in values if id(value) not in self._found}
        if not new:
            return
        self._found |= {key: [] for key in new}
        for referrer in gc.get_referrers(*new.values()):
            if referrer is new:
                continue
            for key in {id(item) for item in gc.get_referents(referrer)} & new.keys():
                self._found[key].append(referrer)

    def of(self, value: Any) -> list[Any]:
        """Return what refers to an object, in the collector's order."""
        self.find([value])
        return self._found[id(value)]


def _holder(value: Any, known: _Referrers) -> str:
    # Plain loops, since a generator expression would hold the object in a closure, and find itself.
    vague = ""
    for referrer in known.of(value):
        name = _name_in(referrer, value, known)
        if name and not name.startswith(_KEY):
            return name
        vague = vague or name
        if _is_container(referrer):
            for owner in known.of(referrer):
                name = _name_in(owner, referrer, known)
                if name and not name.startswith(_KEY):
                    return f"the {type(referrer).__name__} {name}"
    return vague or "an object that Python does not name"


def _is_container(referrer: Any) -> bool:
    return type(referrer) in _CONTAINERS and len(referrer) < _SANE and not _module(referrer)


def _is_plain_dict(referrer: Any) -> bool:
    return isinstance(referrer, dict) and not _module(referrer)


def _module(referrer: Any) -> str:
    """Return the name of the module whose names a dict has; empty if it is no such dict."""
    # Without running code of a dict's own class.
    name = dict.get(referrer, "__name__") if isinstance(referrer, dict) else None
    return name if isinstance(name, str) else ""


def _name_in(holder: Any, value: Any, known: _Referrers) -> str:
    """Return the name that ``holder`` has for a value; empty if it has none, or belongs to a probe."""
    if type(holder) is CellType:
        return "a closure's variable"
    if isinstance(holder, dict):
        key = next((key for key, item in dict.items(holder) if item is value), None)
        if key is None or isinstance(key, tuple):
            return ""
        if module := _module(holder):
            return f"{module}.{key}"
        owners = (other for other in known.of(holder) if _attributes(other) is holder)
        owner = next(owners, None)
        return f"attribute {key} of {type(owner).__qualname__}" if owner is not None else f"{_KEY} {key!r} of a dict"
    # Python 3.11 and later keep attributes in the object itself until code reads its ``__dict__``.
    own = _attributes(holder)
    key = next((key for key, item in own.items() if item is value), None) if own is not None else None
    return f"attribute {key} of {type(holder).__qualname__}" if key is not None else ""


def _attributes(holder: Any) -> dict[str, Any] | None:
    """Return an object's own attributes without running any of its code; None if it has no attributes."""
    if isinstance(holder, (dict, list, tuple, set, type, ModuleType, FrameType)):
        return None
    try:
        found = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None
