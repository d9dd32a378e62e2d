"""Controls: fixed pieces of work, independent of the model, whose time depends on the host and the process only.

They are run alternately with the model, in the same process: on a slow host both are slow, and their ratio is stable.
"""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Any

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.worker.model.device import synchronize

#: A small decoder step: mostly dispatch and launches, as a step of batch 1 is.
_LAYERS, _HIDDEN, _HEADS, _CONTEXT = 8, 256, 4, 64
#: Shape of a weight that is too large for the caches of a CPU core, read by a matrix product.
_STREAM_ROWS, _STREAM_COLUMNS = 4096, 4096
#: Bytes that are copied: more than caches hold; some 10 ms to a GPU, and some 30 ms of new pages on a CPU.
_COPIED = 64 << 20
_REPEATS = 4


class _Layer(torch.nn.Module):  # type: ignore[misc]
    """Runs the operators of a decoder layer: norm, projections, rotation, attention, gated feed-forward."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(_HIDDEN, device=device)
        self.qkv = torch.nn.Linear(_HIDDEN, 3 * _HIDDEN, bias=False, device=device)
        self.out = torch.nn.Linear(_HIDDEN, _HIDDEN, bias=False, device=device)
        self.up = torch.nn.Linear(_HIDDEN, 2 * _HIDDEN, bias=False, device=device)
        self.down = torch.nn.Linear(_HIDDEN, _HIDDEN, bias=False, device=device)
        self.cache = torch.zeros(1, _HEADS, _CONTEXT, _HIDDEN // _HEADS, device=device)

    def forward(self, hidden: Any) -> Any:
        query, key, value = self.qkv(self.norm(hidden)).view(1, 1, 3 * _HEADS, -1).transpose(1, 2).chunk(3, dim=1)
        half = query.shape[-1] // 2
        query = query + torch.cat((-query[..., half:], query[..., :half]), dim=-1) * 0.5
        keys, values = torch.cat((self.cache, key), dim=2), torch.cat((self.cache, value), dim=2)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(1, 1, _HIDDEN))
        gate, up = self.up(hidden).chunk(2, dim=-1)
        return hidden + self.down(torch.nn.functional.silu(gate) * up)


class Control:
    """A piece of work of which only the time is measured."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.device = torch.device("cuda:0" if job.device.kind == "cuda" else "cpu")

    def seconds(self) -> float:
        """Return the median time of a few repeats, in seconds."""
        return statistics.median(self._once() for _ in range(_REPEATS))

    def work(self) -> None:
        """Do the fixed piece of work once."""
        raise NotImplementedError

    def _once(self) -> float:
        synchronize(self._job)
        begin = perf_counter()
        with torch.no_grad():
            self.work()
        synchronize(self._job)
        return perf_counter() - begin


class Steps(Control):
    """Many small operators, each a launch on a GPU, and one that reads a large weight, as in a generation."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._layers = torch.nn.Sequential(*(_Layer(self.device) for _ in range(_LAYERS)))
        self._hidden = torch.zeros(1, 1, _HIDDEN, device=self.device)
        self._weight = torch.zeros(_STREAM_ROWS, _STREAM_COLUMNS, device=self.device)
        self._vector = torch.zeros(_STREAM_COLUMNS, device=self.device)
        self._once()

    def work(self) -> None:
        self._layers(self._hidden)
        torch.mv(self._weight, self._vector)


class Copies(Control):
    """Pageable memory of the host copied to new memory of the device, which is most of a load."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._bytes = torch.ones(_COPIED, dtype=torch.uint8)
        self._once()

    def seconds(self) -> float:
        seconds = super().seconds()
        if self.device.type == "cuda":
            # The load must allocate memory of its own.
            torch.cuda.empty_cache()
        return seconds

    def work(self) -> None:
        self._bytes.to(self.device, copy=True)
