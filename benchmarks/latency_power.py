"""How often the latency gate cries wolf, and how often it sees a slowdown: resampled from recorded samples.

A folder of ``benchmarks/samples`` has the sessions of one model on one kind of machine. *Within one*: both sides of a
comparison are drawn, process by process and with replacement, from the last session, in which nothing changed. *Between
two*: each side is drawn from another session, which is what a baseline in git meets. A slowdown is planted by
multiplying every time of one side, and its ratios to the control. The gate is asked as the plugin asks it: LOOKS[-1]
processes recorded, LOOKS judged; LOADS of the load.

    python benchmarks/latency_power.py benchmarks/samples/* --docs docs/latency-study.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pytest_llmload.baselines.model import RecordedTime
from pytest_llmload.baselines.timings import LOAD, LOADS, LOOKS, moved, timings, undecided
from pytest_llmload.core.metrics import MODEL_TIMES
from pytest_llmload.core.results import LOADED, LoadResult
from pytest_llmload.core.verdicts import INCONCLUSIVE, REGRESSED

Draw = Callable[[int], list[LoadResult]]

FACTORS = (1.0, 1.05, 1.10, 1.30)
TOLERANCE = 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--comparisons", type=int, default=300, help="per cell (default: 300)")
    parser.add_argument("--docs", type=Path, help="file whose <!-- table: power --> is replaced")
    options = parser.parse_args()
    columns = ("samples", "metric", "sessions", "rule", *map(_head, FACTORS), "undecided", "takes")
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for folder in sorted(options.folders):
        sessions = [_results(file) for file in sorted(folder.glob("*.json"))]
        for metric in MODEL_TIMES:
            # An old session may have no control for every time.
            having = [found for each in sessions if (found := [one for one in each if _has(one, metric)])]
            where = {"within one": having[-1:]}
            if len(having) > 1:
                where[f"between two of {len(having)}"] = having
            for (words, drawn), rule in itertools.product(where.items(), RULES):
                row = _row(folder.name, metric, rule, drawn, options.comparisons)
                lines.append(f"| {folder.name} | `{metric}` | {words} | {rule.name} | {row} |")
                print(lines[-1], flush=True)
    if options.docs is not None:
        text = options.docs.read_text(encoding="utf-8")
        table = "<!-- table: power -->\n" + "\n".join(lines) + "\n<!-- end -->"
        text = re.sub(r"<!-- table: power -->.*?<!-- end -->", lambda _: table, text, flags=re.DOTALL)
        options.docs.write_text(text, encoding="utf-8")
    return 0


def _head(factor: float) -> str:
    return "false alarms" if factor == 1 else f"+{100 * (factor - 1):.0f} % seen"


def _results(file: Path) -> list[LoadResult]:
    return [_result(row) for row in json.loads(file.read_text(encoding="utf-8"))["processes"]]


def _has(result: LoadResult, metric: str) -> bool:
    return f"{metric}.relative" in result.samples


def _result(row: dict[str, Any]) -> LoadResult:
    return LoadResult(spec={}, outcome=LOADED, samples=row["samples"], environment={"page_cache": row["page_cache"]})


class _Usual:
    """Fail when a location of all samples is more than the tolerance above the baseline's."""

    def __init__(self, location: str, count: int) -> None:
        self.name = f"{location} of {count} process{'es' if count > 1 else ''}"
        self._location: Callable[[Sequence[float]], float] = getattr(statistics, location)
        self._count = count

    def __call__(self, sides: tuple[Draw, Draw], metric: str, factor: float) -> tuple[str, int]:
        before, after = (
            self._location([sample for result in draw(self._count) for sample in result.samples[metric]])
            for draw in sides
        )
        return (REGRESSED if after * factor > before * (1 + TOLERANCE) else "ok"), self._count


class _Gate:
    """What ``latency_baseline.check`` does."""

    name = "**this gate**"

    def __call__(self, sides: tuple[Draw, Draw], metric: str, factor: float) -> tuple[str, int]:
        looks = LOADS if metric == LOAD else LOOKS
        recorded, current = (draw(looks[-1]) for draw in sides)
        baseline = timings(recorded)[metric]
        verdict = INCONCLUSIVE
        for count in looks:
            before = verdict
            verdict = moved(baseline, _slower(timings(current[:count])[metric], factor), TOLERANCE)[0].verdict
            if not undecided({metric: before}, {metric: verdict}):
                break
        return verdict, count


RULES: tuple[_Usual | _Gate, ...] = (_Usual("mean", 1), _Usual("median", 1), _Usual("median", 5), _Gate())


def _slower(timing: RecordedTime, factor: float) -> RecordedTime:
    """The model takes longer, the control does not."""
    scaled = (
        [[sample * factor for sample in process] for process in part] for part in (timing.samples, timing.relative)
    )
    samples, relative = (tuple(map(tuple, part)) for part in scaled)
    return RecordedTime(timing.median * factor, samples, timing.conditions, relative, timing.control)


def _drawing(sessions: list[list[LoadResult]], seed: str) -> Callable[[], tuple[Draw, Draw]]:
    """Each call two sides to draw processes from: of two sessions, or of the only one."""
    generator = random.Random(seed)

    def sides() -> tuple[Draw, Draw]:
        one, other = generator.sample(sessions, 2) if len(sessions) > 1 else sessions * 2
        return (lambda size: generator.choices(one, k=size)), (lambda size: generator.choices(other, k=size))

    return sides


def _row(label: str, metric: str, rule: Any, sessions: list[list[LoadResult]], comparisons: int) -> str:
    rates: list[str] = []
    undecided: dict[float, float] = {}
    used, seconds = 0, 0.0
    for factor in FACTORS:
        draw = _drawing(sessions, f"{label} {metric} {factor}")
        verdicts = Counter[str]()
        for _ in range(comparisons):
            begin = time.perf_counter()
            verdict, count = rule(draw(), metric, factor)
            seconds += time.perf_counter() - begin
            verdicts[verdict] += 1
            used += count
        rates.append(f"{100 * verdicts[REGRESSED] / comparisons:.1f} %")
        undecided[factor] = verdicts[INCONCLUSIVE] / comparisons
    total = comparisons * len(FACTORS)
    open_ = (
        " / ".join(f"{100 * undecided[factor]:.0f}" for factor in FACTORS) + " %" if any(undecided.values()) else "-"
    )
    cost = f"{used / total:.0f} processes, {1e3 * seconds / total:.0f} ms"
    return f"{' | '.join(rates)} | {open_} | {cost}"


if __name__ == "__main__":
    sys.exit(main())
