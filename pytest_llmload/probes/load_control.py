"""The host's speed around a load, so that a slow host is not mistaken for a slow load."""

from __future__ import annotations

import statistics

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.base import Probe
from pytest_llmload.probes.control import Copies
from pytest_llmload.system import process
from pytest_llmload.worker.model.loaded import Loaded


class LoadControl(Probe):
    """Measures ``load.control``, a control's seconds before and after the load, and ``load.relative``.

    ``load.relative`` is the load's seconds divided by the control's. The probe runs in processes that measure time
    only, since the control, and the pages that such a process copies before it loads, would change figures of memory.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._control: Copies | None = None
        self._seconds: list[float] = []

    def start(self) -> None:
        process.own_pages()

    def mark(self) -> None:
        self._control = Copies(self.job)
        self._seconds = [self._control.seconds()]

    def loaded(self, loaded: Loaded) -> None:
        assert self._control is not None
        self._seconds.append(self._control.seconds())
        self._control = None

    def fill(self, result: LoadResult) -> None:
        around = statistics.mean(self._seconds)
        result.samples["load.control"] = self._seconds
        result.samples["load.relative"] = [seconds / around for seconds in result.samples["load"]]
