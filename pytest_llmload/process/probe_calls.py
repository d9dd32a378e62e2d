"""The calls of a load's probes, each at its moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.own import fill
from pytest_llmload.process.raised import fault, is_own
from pytest_llmload.worker.model.device import is_out_of_memory

if TYPE_CHECKING:
    from pytest_llmload.probes import Probe


class ProbeCalls:
    """The probes of one load; one that raises is not called again, and its fault is recorded in the result."""

    def __init__(self, probes: Sequence[Probe], result: LoadResult) -> None:
        self._probes = list(probes)
        self._result = result
        self._is_filled = False

    def at(self, moment: str, *args: Any) -> None:
        """Call each probe's method for a moment of the load."""
        for probe in list(self._probes):
            self._call(probe, partial(getattr(probe, moment), *args))

    def fill(self, *, is_loaded: bool) -> None:
        """Make the probes write their figures, once; after a load that raised, only probes that are ``partial`` do."""
        if self._is_filled:
            return
        self._is_filled = True
        for probe in list(self._probes):
            if is_loaded or probe.partial:
                self._call(probe, partial(fill, probe, self._result))

    def close(self) -> None:
        """Have each probe release what it holds."""
        for probe in self._probes:
            probe.close()

    def _call(self, probe: Probe, call: Callable[[], None]) -> None:
        """Call one method of a probe; if it raises, record a fault of the probe and do not call it again."""
        try:
            call()
        except Exception as error:
            own = is_own(error) or type(probe).__module__.partition(".")[0] != "pytest_llmload"
            if is_out_of_memory(error) or not own:
                # The model's own code raised while the probe ran it.
                raise
            self._result.faults.append(fault(f"probe {type(probe).__name__!r}", error))
            self._probes.remove(probe)
            probe.close()
