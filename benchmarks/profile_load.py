"""Profile every phase of a load from within its process; imported there by ``--llm-import=profile_load``.

PROFILE_OUT names a folder. Each load writes ``PID.txt`` there: for each phase that begins after this import, the
seconds under the profiler and the functions that took most, by their own time and with what they call.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
from pathlib import Path

from pytest_llmload.process.phases import Phases

_SHOWN = 14
_enter, _leave = Phases.enter, Phases.leave
_profiles: dict[str, cProfile.Profile] = {}


def _entered(self: Phases, name: str) -> None:
    _enter(self, name)
    _profiles[name] = cProfile.Profile()
    _profiles[name].enable()


def _left(self: Phases) -> None:
    for name, profile in _profiles.items():
        profile.disable()
        text = io.StringIO()
        for order in ("tottime", "cumulative"):
            pstats.Stats(profile, stream=text).strip_dirs().sort_stats(order).print_stats(_SHOWN)
        with Path(os.environ["PROFILE_OUT"], f"{os.getpid()}.txt").open("a") as out:
            lines = [line for line in text.getvalue().splitlines() if line.strip()]
            out.write("\n".join([f"=== {name}", *lines, ""]))
    _profiles.clear()
    _leave(self)


setattr(Phases, "enter", _entered)  # noqa: B010 - replaces a method
setattr(Phases, "leave", _left)  # noqa: B010
