"""The loads of a run: one for all tests of a spec, and those that belong to a single test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmload.host.loads.load import Launcher, Load

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec


class SharedLoads:
    """The loads of a run. A load starts only when it is measured or used."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loads: dict[LoadSpec, Load] = {}

    def of(self, spec: LoadSpec) -> Load:
        """Return the load that all tests of a spec share."""
        return self._loads.setdefault(spec, Load(self._launcher, spec))

    def begin_test(self) -> None:
        """Have loads that were ended together with an earlier test begin again."""
        for load in self._loads.values():
            load.forget_interruption()

    def private(self, spec: LoadSpec) -> Load:
        """Return a load that is not shared with other tests."""
        return Load(self._launcher, spec)
