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
        #: The tests to come that ask for loads in their body, by ``llm_load``, so that none of ``specs`` names these.
        self.asking: set[str] = set()
        #: How many loads were measured since the last test ended.
        self._of_test = 0
        self._measured: Counter[LoadSpec] = Counter()

    def measured(self, spec: LoadSpec) -> None:
        """Note that a load was measured once, with its checks."""
        self._measured[spec] += 1
        self._of_test += 1

    def test_ended(self, nodeid: str) -> None:
        """Note that a test has ended: it asks for no further load."""
        self.asking.discard(nodeid)
        self._of_test = 0

    def after(self, current: LoadSpec, prepared: Iterable[LoadSpec]) -> LoadSpec | None:
        """Return the load that probably follows ``current`` and those that processes are ``prepared`` for.

        None if no load is expected.
        """
        prepared = list(prepared)
        left = Counter(self.specs)
        left.subtract(self._measured)
        left.subtract(prepared)
        # A different load that was measured less often than expected is over: its repeats follow it at once.
        follow = (each for each in self.specs if left[each] > 0 and (each == current or not self._measured[each]))
        # A test that asks for loads asks for one, unless it has asked again; the present one is among them.
        again = len(prepared) < len(self.asking) - (self._of_test <= 1)
        return next(follow, current if again else None)
