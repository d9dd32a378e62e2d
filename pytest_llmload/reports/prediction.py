"""Name the lines of code that a predicted figure comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_llmload.core.units import format_bytes

#: The most lines that a text names.
_LINES = 3
#: Metric -> the phase whose allocations explain it, if it is not the load. The loading work is a sum over the load; all
#: other figures are levels.
_PHASES = {"gpu.generate_peak": "generate"}
_SUMS = ("gpu.load_allocated", "gpu.load_allocations")

#: Phase -> rows of operator, line, bytes and number of all requests, bytes at the phase's peak.
Sites = Mapping[str, Sequence[Sequence[Any]]]


def origins(metrics: Iterable[str], now: Sites, base: Sites | None, revision: str) -> list[str]:
    """Return the places that allocate what regressed, a line each: more than at a base revision, if it is known.

    Args:
        metrics: Metrics that regressed.
        now: The places of this run's prediction.
        base: The places of the base revision's prediction; None without a base revision.
        revision: The base revision's name.
    """
    found: dict[str, None] = {}
    for metric in metrics:
        phase = _PHASES.get(metric, "load")
        column = 2 if metric in _SUMS else 4
        sizes = _by_place(now.get(phase, ()), column)
        before = _by_place(base.get(phase, ()), column) if base is not None else {}
        more = {place: size - before.get(place, 0) for place, size in sizes.items()}
        what = f"more than {revision}" if base is not None else "in total"
        where = "over the load" if column == 2 else f"at the peak of the {phase}"
        for place, size in sorted(more.items(), key=lambda item: -item[1])[:_LINES]:
            if size > 0:
                found[f"{format_bytes(size)} {what} {where}: {place[0]} at {place[1]}"] = None
        if base is not None and not any(size > 0 for size in more.values()):
            found[f"no place of the {phase} allocates more than at {revision}"] = None
    return list(found)


def _by_place(rows: Sequence[Sequence[Any]], column: int) -> dict[tuple[str, str], int]:
    """Return bytes by operator and line."""
    sizes: dict[tuple[str, str], int] = {}
    for row in rows:
        place = str(row[0]), str(row[1])
        sizes[place] = sizes.get(place, 0) + int(row[column])
    return sizes
