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
from pytest_llmload.worker.ranks.world import agreed

#: Rounds of generating the workload, after the one that the memory probes looked at and that warmed everything up.
ROUNDS = 5
#: Seconds after which no further round is started; two are always taken.
BUDGET = 30.0


class Timing(Probe):
    """``ttft`` and ``per_token``: medians of the samples, each taken after the device has finished.

    A control runs before, between and after the rounds: ``control`` has its seconds around each round, and
    ``ttft.relative`` and ``per_token.relative`` the samples of a round divided by them. Runs after all probes that read
    memory.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.first: list[float] = []
        #: Of each round.
        self.further: list[list[float]] = []
        self.control: list[float] = []

    def generated(self, loaded: Loaded) -> None:
        if not can_generate(loaded):
            return
        control = Control(self.job)
        begin = perf_counter()
        before = control.seconds()
        while len(self.first) < ROUNDS and (len(self.first) < 2 or agreed(self.job, perf_counter() - begin < BUDGET)):
            self._round(loaded)
            after = control.seconds()
            self.control.append((before + after) / 2)
            before = after

    def _round(self, loaded: Loaded) -> None:
        stamps: list[float] = []

        def stamp() -> None:
            synchronize(self.job)
            stamps.append(perf_counter())

        synchronize(self.job)
        begin = perf_counter()
        generate_workload(loaded, stamp)
        self.first.append(stamps[0] - begin)
        self.further.append([after - before for before, after in pairwise(stamps)])

    def fill(self, result: LoadResult) -> None:
        if self.control:
            result.samples["control"] = self.control
        for name, rounds in (("ttft", [[sample] for sample in self.first]), ("per_token", self.further)):
            samples = [sample for samples in rounds for sample in samples]
            if samples:
                result.samples[name] = samples
                result.metrics[name] = statistics.median(samples)
                # The last round has no control where memory ran out after it.
                result.samples[f"{name}.relative"] = [
                    sample / control
                    for samples, control in zip(rounds, self.control, strict=False)
                    for sample in samples
                ]
