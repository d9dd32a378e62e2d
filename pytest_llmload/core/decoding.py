"""Rebuild dataclasses from JSON of an unknown source, with every value's type checked."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Decoded = TypeVar("Decoded")
#: Decodes data of one kind; the text is its place.
_Decoder = Callable[[Any, str], Any]


class Malformed(ValueError):
    """Data that does not have the declared type; the message names the place and both types."""


def decode(kind: type[Decoded], data: Any, where: str = "the data") -> Decoded:
    """Return ``data`` as ``kind``: a dataclass, ``list[…]``, ``dict[str, …]``, ``tuple[…, ...]``, a plain type.

    Entries that the dataclass does not know are ignored: a newer release may have added them. Raises Malformed.
    """
    value: Decoded = _decoder(cast("Hashable", kind))(data, where)
    return value


@cache
def _decoder(kind: Any) -> _Decoder:
    """Return the decoder of a kind, made once: to look at a type takes longer than to decode a value."""
    if kind is Any:
        return lambda data, where: data
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return _of_optional(_decoder(options[0])) if len(options) < len(arguments) else _decoder(options[0])
    if origin is dict:
        return _of_dict(_decoder(arguments[1]))
    if origin in (list, tuple):
        return _of_items(_decoder(arguments[0]), origin)
    return _of_plain(kind)


def _of_optional(decoded: _Decoder) -> _Decoder:
    return lambda data, where: None if data is None else decoded(data, where)


def _of_dict(decoded: _Decoder) -> _Decoder:
    return lambda data, where: {key: decoded(item, f"{where}, {key}") for key, item in _need(dict, data, where).items()}


def _of_items(decoded: _Decoder, made: type) -> _Decoder:
    return lambda data, where: made([decoded(item, where) for item in _need(list, data, where)])


def _of_plain(kind: type) -> _Decoder:
    accepted = (float, int) if kind is float else (kind,)
    return lambda data, where: data if type(data) in accepted else _need(kind, data, where)


def _of_dataclass(kind: Any) -> _Decoder:
    hints = get_type_hints(kind)
    known = [item for item in dataclasses.fields(kind) if item.init]
    fields = [(item.name, _decoder(hints[item.name])) for item in known]
    required = [
        item.name
        for item in known
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]

    def decoded(data: Any, where: str) -> Any:
        given = _need(dict, data, where)
        values = {name: field(given[name], f"{where}, {name}") for name, field in fields if name in given}
        if missing := [name for name in required if name not in values]:
            raise Malformed(f"{where} has no {missing[0]!r}")
        return kind(**values)

    return decoded


def _need(kind: type, data: Any, where: str) -> Any:
    # To Python, True is an int; here it is not a count.
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise Malformed(f"{where} needs {kind.__name__}, found {type(data).__name__}")
    return data
