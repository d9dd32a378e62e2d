"""The predicted GPUs of one prediction, and what its trace has recorded."""

from __future__ import annotations

from typing import Any

import torch

from pytest_llmload.prediction.devices import GpuModel
from pytest_llmload.prediction.fake_cuda import FakeCuda
from pytest_llmload.prediction.fake_tensors import Registry, Untraceable
from pytest_llmload.prediction.record import Record


class Tracing:
    """The predicted GPUs of one prediction, and what its trace assumed."""

    def __init__(self, model: GpuModel, count: int) -> None:
        self.cuda = FakeCuda(model, count)
        self.record = Record()
        #: Why the trace is incomplete; empty as long as it is complete.
        self.reason = ""
        #: The assumptions of the trace, each once (a dict keeps their order).
        self.assumed: dict[str, None] = {}
        self.registry = Registry(self._malloc, self._free)

    def refuse(self, reason: str) -> Untraceable:
        """Return the error for an operator that cannot be traced; keep the first one's reason."""
        self.reason = self.reason or reason
        return Untraceable(reason)

    def _malloc(self, index: int, nbytes: int) -> int:
        address = self.cuda.allocators[index].malloc(nbytes)
        self.record.allocated(index, address, nbytes)
        return address

    def _free(self, index: int, address: int) -> None:
        self.cuda.allocators[index].free(address)
        self.record.freed(index, address)

    def kept(self, index: int, nbytes: int) -> None:
        """Allocate a block of a GPU for the rest of the process, such as a library's workspace."""
        self._malloc(index, nbytes)

    def scratch(self, index: int, sizes: list[int]) -> None:
        """Allocate blocks of a GPU and release them, as a kernel does for its temporary memory."""
        for address in [self._malloc(index, size) for size in sizes]:
            self._free(index, address)

    def token_follows(self, logits: Any) -> None:
        """Assume that the likeliest token is an ordinary one; which one it is makes no difference to memory."""
        values = torch.zeros(tuple(logits.shape), dtype=logits.dtype)
        values[..., logits.shape[-1] // 2] = 1
        self.registry.learn(logits, values, limit=None)
