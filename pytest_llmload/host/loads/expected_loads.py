"""The loads that the collected tests will ask for, and which of them probably follows the one that is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pytest_llmload.core.spec import LoadSpec


class ExpectedLoads:
    """The expected loads of a run, and how often each of them was measured already."""

    def __init__(self) -> None:
        #: Every spec that the collected tests use, in order, as often as it is probably loaded.
        self.specs: list[LoadSpec] = []
        #: True if a load may be measured that is in no collected test, since a test uses ``llm_load``.
        self.loads_again = False
        self._measured: Counter[LoadSpec] = Counter()

    def measured(self, spec: LoadSpec) -> None:
        """Note that a load was measured once, with its checks."""
        self._measured[spec] += 1

    def after(self, current: LoadSpec, prepared: Iterable[LoadSpec]) -> LoadSpec | None:
        """Return the load that probably follows ``current`` and those that processes are ``prepared`` for.

        None if no load is expected.
        """
        left = Counter(self.specs)
        left.subtract(self._measured)
        left.subtract(prepared)
        # A different load that was measured less often than expected is over: its repeats follow it at once.
        follow = (each for each in self.specs if left[each] > 0 and (each == current or not self._measured[each]))
        return next(follow, current if self.loads_again else None)
