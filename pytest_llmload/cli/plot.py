"""Draw series of values as a line of text and as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_llmload.core.units import format_value

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _LEFT, _TOP, _ROW = 860, 260, 90, 40, 20
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6fb5", "#6b7280")


@dataclass(frozen=True)
class Point:
    """A value after a commit; None if the commit removed it."""

    commit: str
    date: str
    subject: str
    value: float | None


def sparkline(values: Sequence[float | None]) -> str:
    """Return one character per value: the larger the value, the higher the character."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(" " if value is None else _BARS[round((value - low) / step)] for value in values)


def svg(metric: str, unit: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Return the series as steps over the commits that changed any of them, in the order of history."""
    commits = list(dict.fromkeys((point.date, point.commit) for points in series.values() for point in points))
    commits.sort(key=lambda commit: commit[0])
    values = [point.value for points in series.values() for point in points if point.value is not None]
    top = max(values) * 1.05 or 1.0
    places = {
        commit: _LEFT + (index + 0.5) * (_WIDTH - _LEFT) / len(commits) for index, (_, commit) in enumerate(commits)
    }
    height = _TOP + _HEIGHT + 50 + _ROW * len(series)
    width = _WIDTH + 20
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": str(width),
            "height": str(height),
            "viewBox": f"0 0 {width} {height}",
            "font-family": "sans-serif",
        },
    )
    ET.SubElement(root, "title").text = f"{metric} through the history of the baselines"
    ET.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    _text(root, _LEFT, 22, metric, size=16)
    for part in range(5):
        height_ = _TOP + _HEIGHT * (1 - part / 4)
        ET.SubElement(
            root,
            "line",
            {"x1": str(_LEFT), "x2": str(_WIDTH), "y1": f"{height_}", "y2": f"{height_}", "stroke": "#d5dae0"},
        )
        _text(root, 4, height_ + 4, format_value(top * part / 4, unit))
    for date, commit in (commits[0], commits[-1]):
        _text(root, places[commit], _TOP + _HEIGHT + 18, f"{date} {commit[:8]}", anchor="middle")
    for number, (name, points) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        _line(root, points, places, top, unit, colour)
        row = _TOP + _HEIGHT + 45 + _ROW * number
        ET.SubElement(
            root, "rect", {"x": str(_LEFT), "y": f"{row - 10}", "width": "12", "height": "12", "fill": colour}
        )
        _text(root, _LEFT + 20, row, name)
    return ET.tostring(root, encoding="unicode") + "\n"


def _line(
    root: ET.Element, points: Sequence[Point], places: Mapping[str, float], top: float, unit: str, colour: str
) -> None:
    path, is_down = [], False
    for point in points:
        if point.value is None:
            path.append(f"H{places[point.commit]:.1f}")
            is_down = False
            continue
        x, y = places[point.commit], _TOP + _HEIGHT * (1 - point.value / top)
        path.append(f"H{x:.1f} V{y:.1f}" if is_down else f"M{x:.1f} {y:.1f}")
        is_down = True
        dot = ET.SubElement(root, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4", "fill": colour})
        words = f"{point.date} {point.commit[:8]}: {format_value(point.value, unit)}, {point.subject}"
        ET.SubElement(dot, "title").text = words
    if is_down:
        path.append(f"H{_WIDTH}")
    ET.SubElement(root, "path", {"d": " ".join(path), "fill": "none", "stroke": colour, "stroke-width": "2"})


def _text(root: ET.Element, x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> None:
    made = ET.SubElement(
        root,
        "text",
        {"x": f"{x:.0f}", "y": f"{y:.0f}", "font-size": str(size), "text-anchor": anchor, "fill": "#1c2024"},
    )
    made.text = text
