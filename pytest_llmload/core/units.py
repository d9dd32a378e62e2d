"""Parse and print sizes, times and tolerances."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from pytest_llmload.core.quoting import quoted

_BYTES = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_NUMBER_UNIT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def _parse(text: object, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    match = _NUMBER_UNIT.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ValueError(
            f"{quoted(text)} is not a {what}: write a number and one of {', '.join(units)}, as in {example!r}"
        )
    found = float(match[1]) * units[match[2]]
    if not math.isfinite(found):
        raise ValueError(f"{quoted(text)} is larger than any {what}: write one such as {example!r}")
    return found


def parse_bytes(text: object) -> int:
    """Return the bytes that ``"9GiB"`` or ``"512 MB"`` stands for; units are case-sensitive.

    Raises ValueError that says what to write.
    """
    return round(_parse(text, _BYTES, "size", "9GiB"))


def parse_seconds(text: object) -> float:
    """Return the seconds that ``"150ms"`` or ``"2 min"`` stands for. Raises ValueError that says what to write."""
    return _parse(text, _SECONDS, "time", "150ms")


def format_bytes(value: float, more: int = 0) -> str:
    """Return bytes as text, as in ``6.64 GiB``, with ``more`` digits than usual; below 1 KiB, as whole bytes."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _BYTES[unit]:
            return f"{sign}{size / _BYTES[unit]:.{2 + more}f} {unit}"
    return f"{sign}{size:.0f} B"


def format_seconds(value: float, more: int = 0) -> str:
    """Return seconds as text, as in ``34.20 s``, ``12.3 ms`` or ``850 us``, with ``more`` digits than usual."""
    if value >= 1:
        return f"{value:.{2 + more}f} s"
    if value >= 1e-3:
        return f"{value * 1e3:.{1 + more}f} ms"
    return f"{value * 1e6:.{more}f} us"


def format_value(value: float, unit: str, more: int = 0) -> str:
    """Return a metric's value with its unit: ``B`` (bytes), ``s`` (seconds), ``1`` (a count) or another word.

    ``more`` digits are added to the usual ones.
    """
    if unit == "B":
        return format_bytes(value, more)
    if unit == "s":
        return format_seconds(value, more)
    number = f"{value:,.0f}" if float(value).is_integer() else f"{value:.{4 + more}g}"
    return number if unit == "1" else f"{number} {unit}"


def format_movement(old: float, new: float, unit: str) -> str:
    """Return ``2.83 ms -> 2.77 ms``, with up to three digits more than usual if the two would otherwise look equal."""

    def texts(more: int) -> list[str]:
        return [format_value(value, unit, more) for value in (old, new)]

    return " -> ".join(texts(next((more for more in range(4) if len(set(texts(more))) == 2), 0)))


def format_change(value: float, unit: str) -> str:
    """Return a difference with its sign and unit: ``+512 B``, ``-1.20 s``, ``+1``."""
    return f"{'-' if value < 0 else '+'}{format_value(abs(value), unit)}"


def plural(number: int, one: str, many: str = "") -> str:
    """Return the form of a word that fits a number: ``one`` for 1, else ``many``, by default ``one`` with an s."""
    return one if number == 1 else many or f"{one}s"


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with a word in the form that fits it: ``1 weight``, ``3 weights``, ``1 weight is``."""
    return f"{number} {plural(number, one, many)}"


def format_ranges(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: ``0-3,7`` for 0, 1, 2, 3, 7 in any order."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


class Tolerance(NamedTuple):
    """How far a value may move: the larger of ``relative * baseline`` and ``absolute`` (in the metric's unit)."""

    relative: float = 0.0
    absolute: float = 0.0

    def allows(self, baseline: float, current: float) -> bool:
        """Return whether ``current`` is within the tolerance of ``baseline``."""
        return abs(current - baseline) <= self.room(baseline)

    def room(self, baseline: float) -> float:
        """Return the difference from ``baseline`` that is allowed, in the metric's unit."""
        return max(self.relative * abs(baseline), self.absolute)

    def format(self, unit: str) -> str:
        """Return the tolerance as text: ``1 % or 8 MiB``, or ``exact``."""
        parts = []
        if self.relative:
            parts.append(f"{self.relative * 100:g} %")
        if self.absolute:
            parts.append(format_value(self.absolute, unit).replace(".00 ", " "))
        return " or ".join(parts) or "exact"


#: Unit of a metric -> the units in which its absolute tolerance may be written, and an example. The tolerance of a
#: metric in any other unit is a number, with or without that unit.
_ABSOLUTE: dict[str, tuple[dict[str, float] | dict[str, int], str]] = {
    "B": (_BYTES, "8MiB"),
    "s": (_SECONDS, "5ms"),
    "1": ({"": 1}, "3"),
}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[^\W\d_][\w/]*|)\s*")


def parse_tolerance(text: object, unit: str) -> Tolerance:
    """Return the tolerance of a metric in ``unit``: ``"1%"``, ``"8MiB"`` (``B``), ``"5ms"`` (``s``), ``"3"`` (``1``).

    Both kinds together, as in ``"1%|8MiB"``, allow the larger of the two. ``"0"`` means exact in every unit. Raises
    ValueError that says what to write.
    """
    units, example = _ABSOLUTE.get(unit, ({"": 1, unit: 1}, f"3{unit}"))
    wrong = ValueError(
        f"{quoted(text)} is not a tolerance here: write '1%', {example!r}, or '1%|{example}' for the larger of the two"
    )
    if not isinstance(text, str):
        raise wrong
    found: dict[str, float] = {}
    for part in text.split("|"):
        match = _AMOUNT.fullmatch(part)
        if match is None:
            raise wrong
        amount, written = float(match[1]), match[2]
        kind = "relative" if written == "%" else "absolute"
        if kind in found or not math.isfinite(amount):
            raise wrong
        if kind == "relative":
            found[kind] = amount / 100
        elif written in units:
            found[kind] = amount * units[written]
        elif written or amount:
            raise wrong
        else:
            found[kind] = 0.0
    return Tolerance(**found)
