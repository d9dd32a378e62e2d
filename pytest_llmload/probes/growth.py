"""Memory that each further call of a model leaves allocated."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from typing import ClassVar

import torch

from pytest_llmload.baselines.numbers import COARSEST
from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named
from pytest_llmload.core.results import LoadResult
from pytest_llmload.probes.base import Probe
from pytest_llmload.system import allocator
from pytest_llmload.system.garbage import existing_hidden
from pytest_llmload.worker.model import padded_batch
from pytest_llmload.worker.model.device import is_out_of_memory, synchronize
from pytest_llmload.worker.model.generation import can_generate, first_forward, generate_workload
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.relative_error import relative_error
from pytest_llmload.worker.parallel.world import agreed

#: Calls that are compared at most: memory that each of them leaves is growth; memory that only one leaves is a filled
#: cache.
CALLS = 3
#: Bytes that count as none. glibc counts small blocks that it keeps for the next call as handed out: a call that leaves
#: nothing shows up to some thousand bytes, of a tolerance of 64 KiB. A GPU's bytes are exact.
NOISE = {"host.growth": 8 << 10}
_TOKENS = 2


class Growth(Probe):
    """Measures ``gpu.growth`` and ``host.growth``: bytes that every call leaves behind.

    The padded batch, which was just run, is repeated: what a call keeps shows on its few tokens as on the workload's,
    in a fraction of the time. A model that does not run it repeats the workload's prompt instead. No call is repeated
    once there is a call of which nothing is left but noise, since then nothing grows with each of them. Ranks repeat it
    together.

    A GPU's bytes are those of torch's allocator, exact; the host's are those that glibc has handed out (mallinfo2(3)),
    which do not include free pages of its heap. Of these, 8 KiB and less are noise, and count as none.

    A model whose logits are others at each repetition, as one that computes with uninitialised memory, is noted.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named("gpu.growth", "host.growth")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        #: Figure -> the bytes that each repeated call left.
        self.left: dict[str, list[float]] = defaultdict(list)
        self.complaint = "no call was repeated"
        #: The largest relative error of a repeated call's logits.
        self.error = 0.0

    def finished(self, loaded: Loaded) -> None:
        try:
            # Existing objects are not growth, and each collection would walk through all of them.
            with existing_hidden():
                held = self._held()
                for _ in range(CALLS):
                    self._call(loaded)
                    before, held = held, self._held()
                    for name, size in held.items():
                        self.left[name].append(size - before[name])
                    if agreed(self.job, all(min(left) <= NOISE.get(name, 0) for name, left in self.left.items())):
                        break
            self.complaint = ""
        except Exception as error:
            # The model ran before, so the error is reported as the reason for the missing figure.
            if is_out_of_memory(error):
                raise
            self.left.clear()
            self.complaint = f"a repeated call raised {type(error).__name__}: {error}"

    def _call(self, loaded: Loaded) -> None:
        """Run the model once more as it has run before, and drop the result."""
        if loaded.padded_run is not None:
            again = padded_batch.repeat(loaded)
            for before, after in zip(loaded.padded_run.logits, again.logits, strict=True):
                error = relative_error(after, before)
                # What is not finite is a finding of the checks.
                self.error = max(self.error, error if math.isfinite(error) else 0.0)
        elif can_generate(loaded):
            generate_workload(loaded, new_tokens=_TOKENS)
        else:
            first_forward(loaded)

    def fill(self, result: LoadResult) -> None:
        if self.error > COARSEST:
            result.notes.append(
                f"a repeated call on the same tokens gives other logits: relative error {self.error:.2g}; comparisons "
                "of this model's numbers say nothing"
            )
        names = ["host.growth"]
        if self.job.device.kind == "cuda":
            names += ["gpu.growth", *(f"gpu.{gpu}.growth" for gpu in range(torch.cuda.device_count()))]
        for name in names:
            if left := self.left.get(name):
                # The least that any single call left.
                least = min(left)
                result.metrics[name] = least if least > NOISE.get(name, 0) else 0
            else:
                result.unavailable[name] = self.complaint or "the C library does not report it"

    def _held(self) -> dict[str, float]:
        gc.collect()
        synchronize(self.job)
        held: dict[str, float] = {}
        handed_out = allocator.handed_out()
        if handed_out is not None:
            held["host.growth"] = handed_out
        if self.job.device.kind == "cuda":
            each = {f"gpu.{gpu}.growth": torch.cuda.memory_allocated(gpu) for gpu in range(torch.cuda.device_count())}
            held |= {**each, "gpu.growth": sum(each.values())}
        return held
