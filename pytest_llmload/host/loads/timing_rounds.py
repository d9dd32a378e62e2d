"""Time a load in further processes until it is clear whether its times have changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pytest_llmload.baselines.timings import LOAD, LOADS, LOOKS, timings, undecided
from pytest_llmload.core.verdicts import INCONCLUSIVE

if TYPE_CHECKING:
    from pytest_llmload.baselines.model import RecordedTime
    from pytest_llmload.host.loads.load import Load


def until_clear(
    load: Load, seconds: float, judge: Callable[[Mapping[str, RecordedTime] | None], Mapping[str, str]]
) -> None:
    """Judge the times of a load, again after further processes, until each verdict is clear or ``seconds`` are spent.

    ``judge`` returns a verdict for each time; it is called with None first, before any further process, to return the
    times that there are to judge. Raises LoadError if one of the processes does not load any more.
    """
    # A single process is never judged. This call only tells whether there are times to judge; if not, none is started.
    before: Mapping[str, str] = {}
    now = judge(None)
    until = time.monotonic() + seconds
    processes = loads = 0
    for look in zip(LOOKS, LOADS, strict=True):
        open_ = undecided(before, now)
        # An alarm is evaluated once more, even if the seconds are spent.
        alarm = any(now[name] != INCONCLUSIVE for name in open_)
        if not open_ or (before and time.monotonic() > until and not alarm):
            break
        # Stop measuring times whose verdict is clear.
        processes = look[0] if open_ - {LOAD} else processes
        loads = look[1] if LOAD in open_ else loads
        results = load.timed(processes, loads, math.inf if alarm else until)
        before, now = now, judge(timings(results))
