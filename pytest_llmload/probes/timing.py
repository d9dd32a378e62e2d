"""Time to first token and time per token, on the workload."""

from __future__ import annotations

import statistics
from itertools import pairwise
from time import perf_counter
from typing import ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.model.device import synchronize
from pytest_llmload.worker.model.generation import generate_workload, no_single_tokens
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.parallel.world import agreed

#: Seconds after which no further round is started; two rounds are always run.
BUDGET = 30.0


class GenerationTimes(Probe):
    """Measures ``ttft`` and ``per_token``: medians in seconds, each sample taken after the device has finished.

    It runs a few rounds, for the report and for absolute budgets; :class:`Rounds` decides whether a time has changed.
    It runs after all probes that read memory.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named("ttft", "per_token")
    #: Rounds of generating the workload, after the one that the memory probes measured, which warms everything up.
    rounds: ClassVar[int] = 3

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        #: For each round, the seconds to the first token, and the seconds of each further token.
        self.first: list[float] = []
        self.further: list[list[float]] = []

    def generated(self, loaded: Loaded) -> None:
        if no_single_tokens(loaded):
            return
        begin = perf_counter()
        for number in range(self.rounds):
            if number >= 2 and not agreed(self.job, perf_counter() - begin < BUDGET):
                break
            self.round(loaded)

    def round(self, loaded: Loaded) -> None:
        """Generate the workload once."""
        self.generate(loaded, self.job.spec.workload.new_tokens)

    def generate(self, loaded: Loaded, new_tokens: int) -> None:
        """Generate ``new_tokens`` tokens from the workload's prompt, and record the seconds of each."""
        stamps: list[float] = []

        def stamp() -> None:
            synchronize(self.job)
            stamps.append(perf_counter())

        synchronize(self.job)
        begin = perf_counter()
        generate_workload(loaded, stamp, new_tokens)
        self.first.append(stamps[0] - begin)
        self.further.append([after - before for before, after in pairwise(stamps)])

    def fill(self, result: LoadResult) -> None:
        for name, samples in (("ttft", self.first), ("per_token", [each for one in self.further for each in one])):
            if samples:
                result.samples[name] = samples
                result.metrics[name] = statistics.median(samples)
