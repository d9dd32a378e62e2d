"""Fixed pieces of work that have nothing to do with the model: what this host and this process do at the same time.

They are run in turn with the model, in the same process: where the host is slow, both are.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.worker.device import synchronize

#: A decoder's step in small: mostly dispatch and launches, as a step of batch 1 is.
_LAYERS, _HIDDEN, _HEADS, _CONTEXT = 8, 256, 4, 64
#: Bytes of a weight that no cache of a CPU core holds, read by a matrix product.
_STREAM_ROWS, _STREAM_COLUMNS = 4096, 4096
_READ = 64 << 20
_REPEATS = 4


class _Layer(torch.nn.Module):
    """What a decoder layer does, op by op: norm, projections, rotation, attention, gated feed-forward."""

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
    """Seconds of each piece of work, a few at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        device = torch.device("cuda:0" if job.device.kind == "cuda" else "cpu")
        self._layers = torch.nn.Sequential(*(_Layer(device) for _ in range(_LAYERS)))
        self._hidden = torch.zeros(1, 1, _HIDDEN, device=device)
        self._weight = torch.zeros(_STREAM_ROWS, _STREAM_COLUMNS, device=device)
        self._vector = torch.zeros(_STREAM_COLUMNS, device=device)

    def dispatch(self) -> list[float]:
        """Many small operators, each a launch on a GPU."""
        return self._timed(lambda: self._layers(self._hidden))

    def stream(self) -> list[float]:
        """Reading one large weight."""
        return self._timed(lambda: torch.mv(self._weight, self._vector))

    def read(self) -> list[float]:
        """Copying a part of the checkpoint out of the page cache."""
        file = max(Path(self._job.checkpoint.path).glob("*.safetensors"), key=lambda path: path.stat().st_size)
        buffer = bytearray(_READ)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return self._timed(lambda: os.preadv(descriptor, [buffer], 0))
        finally:
            os.close(descriptor)

    def _timed(self, work: Any) -> list[float]:
        seconds = []
        with torch.no_grad():
            for _ in range(_REPEATS):
                synchronize(self._job)
                begin = perf_counter()
                work()
                synchronize(self._job)
                seconds.append(perf_counter() - begin)
        return seconds
