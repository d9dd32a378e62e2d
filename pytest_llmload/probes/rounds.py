"""Times for a verdict: many rounds, alternating with a control."""

from __future__ import annotations

from typing import ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.control import Steps
from pytest_llmload.probes.timing import GenerationTimes
from pytest_llmload.worker.model.loaded import Loaded

#: Generations of one token after each whole one: only one of a round's 33 samples is a time to first token.
_PREFILLS = 3


class Rounds(GenerationTimes):
    """Measures ``ttft`` and ``per_token`` in seconds, and their ratios to a control that runs around each generation.

    ``control`` is the control's seconds around each generation; ``ttft.relative`` and ``per_token.relative`` are the
    samples of a generation divided by it.
    """

    rounds: ClassVar[int] = 5

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        #: The control's seconds around each generation.
        self.control: list[float] = []
        self._control: Steps | None = None
        self._before = 0.0

    def generated(self, loaded: Loaded) -> None:
        self._control = Steps(self.job)
        self._before = self._control.seconds()
        super().generated(loaded)

    def round(self, loaded: Loaded) -> None:
        super().round(loaded)
        for _ in range(_PREFILLS):
            self.generate(loaded, 1)

    def generate(self, loaded: Loaded, new_tokens: int) -> None:
        assert self._control is not None
        super().generate(loaded, new_tokens)
        after = self._control.seconds()
        self.control.append((self._before + after) / 2)
        self._before = after

    def fill(self, result: LoadResult) -> None:
        super().fill(result)
        if not self.control:
            return
        result.samples["control"] = self.control
        for name, generations in (("ttft", [[sample] for sample in self.first]), ("per_token", self.further)):
            if name in result.samples:
                # The last generation has no control where memory ran out after it.
                result.samples[f"{name}.relative"] = [
                    sample / control
                    for samples, control in zip(generations, self.control, strict=False)
                    for sample in samples
                ]
