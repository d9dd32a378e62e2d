"""Lay out plain text in columns, limited lists, and metrics with their units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pytest_llmload.core.units import format_change, format_movement, format_value
from pytest_llmload.core.verdicts import MetricVerdict


def labelled(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines ``  label  text``, aligned also for texts of several lines; a repeated label is left blank."""
    rows = list(rows)
    width = max((len(label) for label, _ in rows), default=0)
    lines = []
    previous = ""
    for label, text in rows:
        first, *more = text.splitlines() or [""]
        lines.append(f"  {'' if label == previous else label:<{width}}  {first}".rstrip())
        lines += [f"  {'':<{width}}  {line}".rstrip() for line in more]
        previous = label
    return lines


def limited(texts: Sequence[str], most: int) -> list[str]:
    """Return the first ``most`` texts, followed by the number of further ones."""
    rest = len(texts) - most
    return [*texts[:most], f"and {rest} more"] if rest > 0 else list(texts)


def joined(names: Sequence[str], most: int) -> str:
    """Return ``a, b, c and 30 more``."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def movement(item: MetricVerdict) -> str:
    """Return the baseline's value and the current one: ``6.64 GiB -> 7.17 GiB``."""
    if item.baseline is not None and item.current is not None:
        return format_movement(item.baseline, item.current, item.unit)
    sides = (item.baseline, item.current)
    return " -> ".join("none" if value is None else format_value(value, item.unit) for value in sides)


def change(item: MetricVerdict) -> str:
    """Return ``+8.0 %``, or the difference itself if a percentage would hide it."""
    moved = item.change
    if moved is None:
        return ""
    percent = 100 * moved / item.baseline if item.baseline else 0.0
    alike = format_value(item.baseline or 0, item.unit) == format_value(item.current or 0, item.unit)
    if item.unit == "1" or alike or abs(percent) < 0.05:
        return format_change(moved, item.unit)
    return f"{percent:+.1f} %"


def allowance(item: MetricVerdict) -> str:
    """Return ``tolerance 2 MiB`` or ``exact``."""
    text = item.tolerance.format(item.unit)
    return text if text == "exact" else f"tolerance {text}"


def shortened(text: str, width: int) -> str:
    """Return a text cut to at most ``width`` characters."""
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"
