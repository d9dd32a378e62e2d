"""A record of every allocation, with its operator and the line of code that ran the operator."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pytest_llmload.core.code_paths import short_path

#: Files whose frames are skipped: torch's own, and those of this package.
_SKIPPED = ("/torch/", "/pytest_llmload/prediction/")
#: Rows of a table.
_ROWS = 12
#: A probe's moment -> the phase that it begins or ends.
_MOMENTS = {"mark": "load", "forwarding": "forward", "generating": "generate"}


@dataclass(frozen=True)
class Site:
    """An operator and the line of code that ran it."""

    #: ``aten._to_copy.default``.
    operator: str
    #: ``bitsandbytes/functional.py:929 quantize_4bit``.
    line: str


@dataclass(frozen=True)
class SiteMemory:
    """The memory that one site requested in a phase."""

    site: Site
    #: Bytes and number of all its requests, and those of its bytes that were live at the phase's peak.
    nbytes: int
    count: int
    at_peak: int


class Record:
    """The allocations and releases of one prediction, in order."""

    def __init__(self) -> None:
        #: Phase -> bytes (negative for a release) and the site's number.
        self._events: dict[str, list[tuple[int, int]]] = {"": []}
        self._phase = ""
        self._sites: list[Site] = []
        self._numbers: dict[Any, int] = {}
        self._live: dict[tuple[int, int], tuple[int, int]] = {}
        self._operator: Any = None

    def moment(self, moment: str) -> None:
        """Begin the phase that a probe's moment begins."""
        if moment in _MOMENTS:
            self._phase = _MOMENTS[moment]
            self._events[self._phase] = []

    def operator_runs(self, func: Any) -> None:
        """Attribute the next allocations to an operator."""
        self._operator = func

    def allocated(self, index: int, address: int, nbytes: int) -> None:
        """Note that GPU ``index`` allocated a block, for the line of code that runs now."""
        site = self._site()
        self._live[index, address] = nbytes, site
        self._events[self._phase].append((nbytes, site))

    def freed(self, index: int, address: int) -> None:
        """Note that GPU ``index`` released a block. Raises KeyError if it was not allocated."""
        nbytes, site = self._live.pop((index, address))
        self._events[self._phase].append((-nbytes, site))

    @property
    def last_line(self) -> str:
        """Return the line of code that allocated last."""
        events = [event for phase in self._events.values() for event in phase if event[0] > 0]
        return self._sites[events[-1][1]].line if events else "the first line"

    def tables(self) -> dict[str, list[SiteMemory]]:
        """Return, by phase, the sites that requested the most bytes and those that held the most at its peak."""
        live: dict[int, int] = defaultdict(int)
        return {phase: self._table(events, live) for phase, events in self._events.items()}

    def _table(self, events: list[tuple[int, int]], live: dict[int, int]) -> list[SiteMemory]:
        asked: dict[int, int] = defaultdict(int)
        count: dict[int, int] = defaultdict(int)
        level = peak = sum(live.values())
        highest, place = list(live.items()), -1
        for position, (nbytes, _) in enumerate(events):
            level += nbytes
            if level > peak:
                peak, place = level, position
        for position, (nbytes, site) in enumerate(events):
            live[site] += nbytes
            if nbytes > 0:
                asked[site] += nbytes
                count[site] += 1
            if position == place:
                highest = list(live.items())
        at_peak = dict(highest)
        chosen = {
            *sorted(asked, key=lambda site: -asked[site])[:_ROWS],
            *sorted(at_peak, key=lambda site: -at_peak[site])[:_ROWS],
        }
        rows = [SiteMemory(self._sites[site], asked[site], count[site], at_peak.get(site, 0)) for site in chosen]
        return sorted(rows, key=lambda row: (-row.at_peak, -row.nbytes))

    def _site(self) -> int:
        frame = sys._getframe(2)
        while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _SKIPPED):
            frame = frame.f_back
        key = (self._operator, frame.f_code, frame.f_lineno)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._sites)
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            line = f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno} {name}"
            self._sites.append(Site(str(self._operator), line))
        return number
