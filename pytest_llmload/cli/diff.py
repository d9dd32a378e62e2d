"""Compare two sides, each of which is a JSON report, a folder of baselines, or a git revision.

Figures within the tolerance of their metric count as equal, and so do times of fewer processes than a verdict needs
(--all prints them too). The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pytest_llmload.baselines import manifest
from pytest_llmload.baselines.environment import changes
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.statistics import PROCESSES
from pytest_llmload.cli import sources
from pytest_llmload.cli.refused import add_baselines, columns
from pytest_llmload.cli.sources import Place
from pytest_llmload.core.metrics import find
from pytest_llmload.core.units import counted, plural
from pytest_llmload.core.verdicts import EXACT, MetricVerdict
from pytest_llmload.reports.layout import allowance, change, movement

EQUAL, MOVED, ONE_SIDE = "equal", "moved", "one side"


@dataclass(frozen=True)
class FigureChange:
    """One figure of one load on two sides."""

    name: str
    kind: str
    old: float | None
    new: float | None
    unit: str
    text: str


@dataclass(frozen=True)
class LoadChange:
    """One load on two sides."""

    place: Place
    #: Why the sides cannot be compared: only one has the load, or their models differ.
    whole: str
    rows: tuple[FigureChange, ...] = ()
    modules: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Return whether anything besides the environment differs."""
        return bool(self.whole or self.modules or any(row.kind != EQUAL for row in self.rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("old", metavar="OLD", help="a report, a folder of baselines, or a git revision")
    parser.add_argument("new", metavar="NEW", help="the same")
    add_baselines(parser)
    parser.add_argument("--all", action="store_true", help="also print figures that are equal within their tolerance")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the differences; return 1 if there are any, else 0."""
    old, new = (sources.read(side, options.baselines) for side in (options.old, options.new))
    found = list(differences(old, new, sources.failed(options.old), sources.failed(options.new)))
    if options.json:
        shown: list[Any] = [{**asdict(item), "differs": item.differs} for item in found if item.differs or options.all]
        print(json.dumps(shown, indent=1, ensure_ascii=False))
    else:
        lines = [line for item in found if item.differs or options.all for line in _lines(item, is_all=options.all)]
        equal = sum(not item.differs for item in found)
        differing = len(found) - equal
        said = f"{differing} of {counted(len(found), 'load')} {plural(differing, 'differs', 'differ')}"
        print("\n".join([*lines, said]))
    return 1 if any(item.differs for item in found) else 0


def differences(
    old: Mapping[Place, Baseline],
    new: Mapping[Place, Baseline],
    old_failed: Mapping[Place, str],
    new_failed: Mapping[Place, str],
) -> Iterator[LoadChange]:
    """Yield each load of either side; ``…_failed`` are loads without a model, with the reason."""
    for place in sorted({*old, *new, *old_failed, *new_failed}):
        before, after = old.get(place), new.get(place)
        if before is None or after is None:
            yield LoadChange(place, _one_sided(before, old_failed.get(place, ""), new_failed.get(place, "")))
            continue
        whole = "the models have different shapes" if before.shape != after.shape else ""
        yield LoadChange(
            place,
            whole,
            tuple(_rows(before, after)),
            tuple(item.text for item in manifest.diff(before.manifest, after.manifest)),
            tuple(changes(before.environment, after.environment)),
        )


def _one_sided(before: Baseline | None, old_failed: str, new_failed: str) -> str:
    """Return why one side or both have no figures; empty if the load failed in the same way on both."""
    if old_failed == new_failed:
        return "" if old_failed else f"only in {'NEW' if before is None else 'OLD'}"
    return "; ".join(f"{side}: {reason}" for side, reason in (("OLD", old_failed), ("NEW", new_failed)) if reason)


def _rows(old: Baseline, new: Baseline) -> Iterator[FigureChange]:
    sides = [{**side.memory, **side.work} for side in (old, new)]
    few = set()
    for side, baseline in zip(sides, (old, new), strict=True):
        for host, times in baseline.time.items():
            side |= {f"{name} on {host}": timing.median for name, timing in times.items()}
            few |= {f"{name} on {host}" for name, timing in times.items() if len(timing.samples) < PROCESSES}
    for name in dict.fromkeys((*sides[0], *sides[1])):
        before, after = (side.get(name) for side in sides)
        metric = find(name.partition(" on ")[0])
        unit = metric.unit if metric else "1"
        if before is None or after is None:
            text = f"only in {'NEW' if before is None else 'OLD'}"
            yield FigureChange(name, EQUAL if name in few else ONE_SIDE, before, after, unit, text)
            continue
        item = MetricVerdict(name, "", before, after, unit, metric.tolerance if metric else EXACT)
        is_aside = name in few or (metric is not None and metric.informative)
        kind = EQUAL if is_aside or item.tolerance.allows(before, after) else MOVED
        yield FigureChange(
            name, kind, before, after, unit, f"{movement(item)}  ({change(item) or '+0'}, {allowance(item)})"
        )


def _lines(item: LoadChange, *, is_all: bool) -> Iterator[str]:
    yield f"{item.place}" + (f": {item.whole}" if item.whole else "")
    rows = [row for row in item.rows if is_all or row.kind != EQUAL]
    pairs = [(row.name, row.text) for row in rows]
    pairs += [("modules", text) for text in item.modules] + [("changed", text) for text in item.changed]
    yield from (f"  {line}" for line in columns(pairs))
