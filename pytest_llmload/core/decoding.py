"""Rebuild dataclasses from JSON of an unknown source, with every value's type checked."""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Decoded = TypeVar("Decoded")


class Malformed(ValueError):
    """Data that does not have the declared type; the message names the place and both types."""


def decode(kind: type[Decoded], data: Any, where: str = "the data") -> Decoded:
    """Return ``data`` as ``kind``: a dataclass, ``list[…]``, ``dict[str, …]``, ``tuple[…, ...]``, a plain type.

    Entries that the dataclass does not know are ignored: a newer release may have added them. Raises Malformed.
    """
    value: Decoded = _decode(kind, data, where)
    return value


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if data is None and len(options) < len(arguments) else _decode(options[0], data, where)
    if origin is dict:
        return {key: _decode(arguments[1], item, f"{where}, {key}") for key, item in _need(dict, data, where).items()}
    if origin in (list, tuple):
        items = [_decode(arguments[0], item, where) for item in _need(list, data, where)]
        return items if origin is list else tuple(items)
    if kind is float and type(data) is int:
        return data
    return _need(kind, data, where)


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    given = _need(dict, data, where)
    hints = _hints(kind)
    known = [item for item in dataclasses.fields(kind) if item.init]
    values = {
        item.name: _decode(hints[item.name], given[item.name], f"{where}, {item.name}")
        for item in known
        if item.name in given
    }
    required = [
        item.name
        for item in known
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise Malformed(f"{where} has no {missing[0]!r}")
    return kind(**values)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _need(kind: type, data: Any, where: str) -> Any:
    # To Python, True is an int; here it is not a count.
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise Malformed(f"{where} needs {kind.__name__}, found {type(data).__name__}")
    return data
