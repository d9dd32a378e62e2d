"""Draw charts as inline SVG. Bars are measured in per cent, so that they fit a window of any width."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pytest_llmload.core.units import counted, format_bytes, format_seconds
from pytest_llmload.reports.html.elements import el

#: The most points of a line, and the most dots of a distribution, that a picture needs.
MOST_POINTS, MOST_DOTS = 80, 15
_HEIGHT = 64


@dataclass(frozen=True)
class Part:
    """One part of a stacked bar: its CSS class, its name and its length."""

    kind: str
    label: str
    value: float


def stacked(
    parts: Sequence[Part], most: float, form: Callable[[float], str], *, baseline: float | None = None
) -> ET.Element:
    """Return one stacked bar on a scale that ends at ``most``, with a tick at the baseline."""
    shown = [part for part in parts if part.value > 0]
    words = [f"{part.label} {form(part.value)}" for part in shown]
    words += [f"baseline {form(baseline)}"] if baseline is not None else []
    pieces, start = [], 0.0
    for part in shown:
        pieces.append(
            el("rect", x=_percent(start, most), width=_percent(part.value, most), height="100%", class_=part.kind)
        )
        start += part.value
    if baseline is not None:
        place = _percent(baseline, most)
        pieces.append(el("line", x1=place, x2=place, y1="0", y2="100%", class_="tick"))
    # Browsers show the title over the bar, and screen readers read it out.
    return el("svg", el("title", ", ".join(words)), *pieces, class_="bar", role="img")


def strip(samples: Sequence[float], low: float, high: float, *, baseline: float | None = None) -> ET.Element:
    """Return samples as dots on a line, with their median and the baseline's."""
    median = statistics.median(samples)
    ordered = sorted(samples)
    count = min(len(ordered), MOST_DOTS)
    # Pick samples evenly by rank, including the smallest and the largest.
    dots = [ordered[round(index * (len(ordered) - 1) / max(count - 1, 1))] for index in range(count)]
    span = high - low or 1.0
    marks = [el("circle", cx=_percent(value - low, span), cy="50%", r="3", class_="dot") for value in dots]
    for value, kind in ((median, "median"), (baseline, "tick")):
        if value is not None:
            place = _percent(value - low, span)
            marks.append(el("line", x1=place, x2=place, y1="0", y2="100%", class_=kind))
    words = (
        f"{counted(len(samples), 'sample')} from {format_seconds(ordered[0])} to {format_seconds(ordered[-1])}, "
        f"median {format_seconds(median)}"
    )
    words += f", baseline {format_seconds(baseline)}" if baseline is not None else ""
    return el("svg", *marks, class_="bar strip", role="img", aria_label=words)


def lines(series: Mapping[str, Sequence[Sequence[float]]]) -> ET.Element:
    """Return memory over time with one line per place, from the start of the load; a text below describes the axes."""
    points = [(time, size) for values in series.values() for time, size in values]
    end, top = max(time for time, _ in points) or 1.0, max(size for _, size in points) or 1.0
    paths = []
    for number, (place, values) in enumerate(series.items()):
        step = -(-len(values) // MOST_POINTS)
        kept = [max(values[index : index + step], key=lambda point: point[1]) for index in range(0, len(values), step)]
        path = " ".join(
            f"{100 * time / end:.1f},{_HEIGHT - (_HEIGHT - 2) * max(size, 0) / top:.1f}" for time, size in kept
        )
        line = el("polyline", points=path, class_=f"line line{number % 4}", vector_effect="non-scaling-stroke")
        line.append(el("title", place))
        paths.append(line)
    words = ", ".join(f"{place} up to {format_bytes(max(size for _, size in v))}" for place, v in series.items())
    drawing = el(
        "svg",
        *paths,
        viewBox=f"0 0 100 {_HEIGHT}",
        preserveAspectRatio="none",
        class_="timeline",
        role="img",
        aria_label=f"memory while loading, {format_seconds(end)}: {words}",
    )
    keys = [
        el("span", el("i", class_=f"key line{number % 4}"), f"{place} · highest {format_bytes(_top(values))} ")
        for number, (place, values) in enumerate(series.items())
    ]
    axis = el("p", *keys, el("span", f"0 to {format_seconds(end)}", class_="end"), class_="axis")
    return el("figure", drawing, axis)


def _top(values: Sequence[Sequence[float]]) -> float:
    return max(size for _, size in values)


def _percent(value: float, whole: float) -> str:
    return f"{min(max(100 * value / whole if whole else 0.0, 0.0), 100.0):.2f}%"
