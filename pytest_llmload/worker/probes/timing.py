"""Time to first token and time per token, on the workload."""

from __future__ import annotations

import statistics
from itertools import pairwise
from time import perf_counter

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.worker.control import Control
from pytest_llmload.worker.device import synchronize
from pytest_llmload.worker.generation import can_generate, generate_workload
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.probes.base import Probe

#: Rounds of generating the workload, after the one that the memory probes looked at and that warmed everything up.
ROUNDS = 5
#: Seconds after which no further round is started; two are always taken.
BUDGET = 30.0


class Timing(Probe):
    """``ttft`` and ``per_token``: medians of the samples, each taken after the device has finished.

    Runs last: the other probes have read their figures.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.first: list[float] = []
        self.further: list[float] = []
        self.control: dict[str, list[float]] = {"dispatch": [], "stream": [], "read": []}

    def generated(self, loaded: Loaded) -> None:
        if not can_generate(loaded):
            return
        control = Control(self.job)
        control.dispatch()
        control.stream()
        self.control["read"] += control.read()
        begin = perf_counter()
        self._control(control)
        while len(self.first) < ROUNDS and (len(self.first) < 2 or perf_counter() - begin < BUDGET):
            self._round(loaded)
            self._control(control)

    def _control(self, control: Control) -> None:
        self.control["dispatch"] += control.dispatch()
        self.control["stream"] += control.stream()

    def _round(self, loaded: Loaded) -> None:
        stamps: list[float] = []

        def stamp() -> None:
            synchronize(self.job)
            stamps.append(perf_counter())

        synchronize(self.job)
        begin = perf_counter()
        generate_workload(loaded, stamp)
        self.first.append(stamps[0] - begin)
        self.further += [after - before for before, after in pairwise(stamps)]

    def fill(self, result: LoadResult) -> None:
        for name, samples in (("ttft", self.first), ("per_token", self.further)):
            if samples:
                result.samples[name] = samples
                result.metrics[name] = statistics.median(samples)
        for name, samples in self.control.items():
            if samples:
                result.samples[f"control.{name}"] = samples
