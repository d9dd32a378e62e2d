"""Record the seconds of each phase of a load."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter


class Phases:
    """The consecutive phases of one load: each begins when the previous one ends, so that they add up to its time.

    ``tell`` is called with the name of each phase before it begins, ``seconds`` receives the seconds of each.
    """

    def __init__(self, tell: Callable[[str], None], seconds: dict[str, float]) -> None:
        self._tell = tell
        self._seconds = seconds
        self._name = ""
        self._since = 0.0

    def enter(self, name: str) -> None:
        """Begin a phase, which ends the previous one."""
        self.leave()
        self._tell(name)
        self._name = name

    def leave(self) -> None:
        """End the current phase, if there is one."""
        now = perf_counter()
        if self._name:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = "", now
