"""Name the lines of code that allocated the memory by which a load exceeds its baseline."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_llmload.core.results import KEPT, AllocationSite, LoadResult
from pytest_llmload.core.units import format_bytes
from pytest_llmload.core.verdicts import REGRESSED, Comparison

#: Lines that a failure names.
_MOST = 5
_MOMENTS = {"load": "at the peak of the load", "generate": "at the peak of generating", KEPT: "kept after the load"}
#: Last part of a metric's name -> the moments whose allocations explain it. ``""`` is the moment of the highest phase.
_EXPLAINS = {
    "load_allocated": ("load",),
    "load_allocations": ("load",),
    "load_peak": ("load", KEPT),
    "generate_peak": ("generate", KEPT),
    "reserved_peak": ("", KEPT),
    "peak": ("", KEPT),
    "settled": (KEPT,),
    "other_tensors": (KEPT,),
    "process": (KEPT,),
}


def is_explained(comparison: Comparison) -> bool:
    """Return whether repeating the load with its allocations recorded can explain why a comparison fails."""
    return any(_moments(item.name) for item in comparison.having(REGRESSED))


def lines(result: LoadResult, comparison: Comparison) -> list[str]:
    """Return the allocations that explain the regressed metrics: bytes, line, moment, holder, and what the baseline's
    load held there.

    Those that explain the first metric come first, and of these the ones that hold the most beyond the baseline's.
    """
    rank: dict[tuple[str, str], int] = {}
    for number, item in enumerate(comparison.having(REGRESSED)):
        for each in _moments(item.name):
            rank.setdefault((each or _highest(result), _place(item.name)), number)
    found = [(rank.get((each.moment, _place(each.place))), each) for each in result.allocations]
    explaining = [(number, (each.baseline or 0) - each.bytes, each) for number, each in found if number is not None]
    explaining.sort(key=lambda entry: entry[:2])
    return [_line(each) for *_, each in explaining[:_MOST]]


def _line(each: AllocationSite) -> str:
    where = "" if each.place == "host" else f" on GPU {each.place.partition('.')[2]}"
    held = f", held by {each.held_by}" if each.held_by else ""
    return f"{format_bytes(each.bytes)}{where} by {each.site} ({moment(each)}{held}{_before(each)})"


def moment(each: AllocationSite) -> str:
    """Return the words for the moment at which the memory was held."""
    return _MOMENTS.get(each.moment, each.moment)


def _before(each: AllocationSite) -> str:
    if each.baseline is None:
        return ""
    return f", {format_bytes(each.baseline)} in the baseline" if each.baseline else ", not among the baseline's largest"


def _moments(name: str) -> tuple[str, ...]:
    return _EXPLAINS.get(name.rpartition(".")[2], ()) if name.startswith(("host.", "gpu.")) else ()


def _place(name: str) -> str:
    return name.partition(".")[0]


def _highest(result: LoadResult) -> str:
    """Return the phase with the highest peak. The first forward is not repeated, since generating begins with it."""
    phases: Iterator[tuple[float, str]] = ((max(peaks.values()), name) for name, peaks in result.phase_peaks.items())
    return "load" if max(phases, default=(0.0, "load"))[1] == "load" else "generate"
