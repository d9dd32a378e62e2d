"""Follow a metric through the git history of the baselines: each commit that changed it, with a line and a plot."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llmload.baselines.codec import loads
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.cli import git
from pytest_llmload.cli.plot import Point, sparkline, svg
from pytest_llmload.cli.refused import CommandRefused, add_baselines, columns
from pytest_llmload.cli.sources import place_of
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.metrics import lookup
from pytest_llmload.core.units import format_value
from pytest_llmload.core.verdicts import MetricVerdict
from pytest_llmload.reports.layout import change
from pytest_llmload.system.files import replace_text


@dataclass
class _Series:
    """The values of one baseline file in the order of history."""

    path: str
    points: list[Point] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("metric", metavar="METRIC", help="gpu.settled, host.peak, load, token.kernels …")
    parser.add_argument(
        "--only", metavar="TEXT", action="append", default=[], help="only files whose path contains this text"
    )
    add_baselines(parser)
    parser.add_argument("--svg", metavar="FILE", type=Path, help="also draw the history into this file")


def run(options: argparse.Namespace) -> int:
    """Print every series of the metric; return 0. Raises CommandRefused if there is none."""
    try:
        unit = lookup(options.metric).unit
    except KeyError as error:
        raise CommandRefused(str(error.args[0])) from None
    found = [series for series in _series(options.metric, options.baselines) if _wanted(series.path, options.only)]
    if not found:
        raise CommandRefused(f"no commit has a baseline with {options.metric} below {options.baselines}")
    for series in found:
        print(f"{_title(series.path)}  {sparkline([point.value for point in series.points])}")
        rows, before = [], None
        for point in series.points:
            text = "gone" if point.value is None else format_value(point.value, unit)
            moved = MetricVerdict("", "", before, point.value, unit)
            rows.append((point.date, point.commit[:10], text, change(moved), point.subject))
            before = point.value
        print("\n".join(f"  {line}" for line in columns(rows)))
    if options.svg is not None:
        drawn = {_title(series.path): series.points for series in found}
        try:
            replace_text(options.svg, svg(options.metric, unit, drawn))
        except OSError as error:
            raise CommandRefused(f"cannot write {options.svg}: {error.strerror or error}") from None
        print(f"wrote {options.svg}")
    return 0


def _wanted(path: str, texts: list[str]) -> bool:
    return all(text in path for text in texts)


def _title(path: str) -> str:
    place = place_of(path)
    return str(place) if place else path


def _series(metric: str, folder: Path) -> list[_Series]:
    """Return each file's points where the value changed; a file that was moved continues under its new name."""
    commits = git.history(folder)
    texts = git.contents(blob for commit in commits for blob in commit.changes.values() if blob is not None)
    values = {blob: _value(text, metric) for blob, text in texts.items()}
    current: dict[str, tuple[_Series, str]] = {}
    found: list[_Series] = []
    for commit in commits:
        gone = {path: current.pop(path) for path, blob in commit.changes.items() if blob is None and path in current}
        for path, blob in commit.changes.items():
            if blob is None or place_of(path) is None:
                continue
            moved = next((old for old, (_, was) in gone.items() if was == blob and path not in current), None)
            if path in current:
                series = current[path][0]
            elif moved is not None:
                series = gone.pop(moved)[0]
                series.path = path
            else:
                series = _Series(path)
                found.append(series)
            current[path] = series, blob
            _add(series, Point(commit.id, commit.date, commit.subject, values[blob]))
        for series, _ in gone.values():
            _add(series, Point(commit.id, commit.date, commit.subject, None))
    return [series for series in found if any(point.value is not None for point in series.points)]


def _add(series: _Series, point: Point) -> None:
    if (series.points[-1].value if series.points else None) != point.value:
        series.points.append(point)


def _value(text: str, metric: str) -> float | None:
    """Return the metric in a file, for a time the smallest median over kinds of host; None if the file lacks it."""
    try:
        baseline = loads(text, "a baseline")
    except BaselineError:
        # A commit may hold a broken file; its successors count.
        return None
    return _figure(baseline, metric)


def _figure(baseline: Baseline, metric: str) -> float | None:
    figures = {**baseline.memory, **baseline.work}
    times = [times[metric].median for times in baseline.time.values() if metric in times]
    return figures.get(metric, min(times, default=None))
