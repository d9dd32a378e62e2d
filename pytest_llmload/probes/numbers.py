"""What the model computes on fixed tokens, and a checksum of its weights."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult, Numbers
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.model.checksums import checksums
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import BUFFER

#: The number of positions, and of ids at each position, whose logits are kept.
POSITIONS = 8
IDS = 8


class OutputNumbers(Probe):
    """Records logits at fixed places, log-sum-exp, top-1 margin, and the buffers that a checkpoint does not contain."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.numbers = Numbers()

    def loaded(self, loaded: Loaded) -> None:
        for held in loaded.inventory.held:
            floating = held.dtype.startswith(("float", "bfloat")) and held.tensor is not None and held.device != "meta"
            if floating and held.role == BUFFER and not held.persistent:
                values = held.tensor.detach().cpu().double()
                self.numbers.buffers[held.path] = [float(values.sum()), float(values.norm())]

    def forwarded(self, loaded: Loaded) -> None:
        logits = loaded.logits
        if logits is None or logits.dim() != 3:
            return
        positions = spread(logits.shape[1], POSITIONS)
        # Only a few rows are copied: the logits of a long prompt are larger than many models.
        # numpy's arithmetic: torch's would start a thread for each core, which takes longer than the arithmetic.
        rows = logits[0, torch.tensor(positions, device=logits.device)].detach().cpu().float().numpy()
        top = np.sort(np.partition(rows, -min(2, rows.shape[1]), axis=1)[:, -2:], axis=1)
        self.numbers.logits = [float(value) for value in rows[:, spread(rows.shape[1], IDS)].reshape(-1)]
        # What is not finite is a finding of the checks.
        with np.errstate(invalid="ignore"):
            self.numbers.logsumexp = [float(value) for value in _logsumexp(rows.astype(np.float64))]
            self.numbers.margin = [float(value) for value in top[:, -1] - top[:, 0]]

    def finished(self, loaded: Loaded) -> None:
        run = loaded.padded_run
        if run is not None:
            self.numbers.layers = run.layers
            self.numbers.padded = [
                float(value) for step in run.logits for row in step for value in row[spread(row.shape[0], IDS)]
            ]
        self.numbers.checksums = checksums(loaded.inventory)

    def fill(self, result: LoadResult) -> None:
        result.numbers = self.numbers


def _logsumexp(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``log(sum(exp(row)))`` of each row, shifted by its maximum so that nothing overflows."""
    highest = rows.max(axis=1, keepdims=True)
    return np.asarray(np.log(np.exp(rows - highest).sum(axis=1)) + highest[:, 0])


def spread(size: int, count: int) -> list[int]:
    """Return up to ``count`` different indices spread over ``range(size)``, including the first and the last."""
    if size <= count:
        return list(range(size))
    return [index * (size - 1) // (count - 1) for index in range(count)]
