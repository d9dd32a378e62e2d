"""A checksum of every byte of the stored weights, taken on the device that they lie on."""

from __future__ import annotations

import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pytest_llmload.worker.model.tensors import BUFFER, PARAMETER, Held, Inventory

#: Words of 8 bytes that are summed at once on a GPU.
_CHUNK = 1 << 22
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_MODULUS = 1 << 64


def checksums(inventory: Inventory) -> dict[str, str]:
    """Return one checksum for the tensors whose paths differ in their numbers only; two swapped rows change it.

    Parameters and persistent buffers in memory; packed values of quantised weights as they are stored.
    """
    weights = [held for held in inventory.distinct() if _is_weight(held)]
    found: dict[str, int] = defaultdict(int)
    # zlib releases the interpreter's lock while it reads. On a GPU, each thread would take memory of its own.
    on_host = all(held.tensor.device.type == "cpu" for held in weights)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if on_host else 1) as threads:
        for held, value in zip(weights, threads.map(_of_tensor, weights), strict=True):
            key = _NUMBER.sub("*", held.path)
            place = zlib.crc32(held.path.encode()) | 1
            found[key] = (found[key] + place * value) % _MODULUS
    return {name: f"{value:016x}" for name, value in sorted(found.items())}


def _is_weight(held: Held) -> bool:
    weight = held.role == PARAMETER or (held.role == BUFFER and held.persistent)
    return weight and held.tensor is not None and held.nbytes > 0 and not held.source


def _of_tensor(held: Held) -> int:
    raw = held.tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.device.type == "cpu":
        return zlib.crc32(raw.numpy().data)
    whole = raw.numel() // 8 * 8
    # A tensor that does not begin at a multiple of 8 bytes cannot be looked at as words.
    words = raw[:whole].view(torch.int64) if not raw.storage_offset() % 8 else raw[:whole].clone().view(torch.int64)
    total = sum(_weighted(chunk, number) for number, chunk in enumerate(_chunks(words)))
    tail = int.from_bytes(bytes(raw[whole:].cpu().tolist()), "little")
    return (total + tail * 0x9E3779B97F4A7C15) % _MODULUS


def _chunks(words: Any) -> Iterator[Any]:
    yield from words.split(_CHUNK) if words.numel() else ()


def _weighted(chunk: Any, number: int) -> int:
    """Return the sum of the words, each times an odd number that depends on its place; overflow wraps."""
    places = torch.arange(chunk.numel(), device=chunk.device, dtype=torch.int64) + number * _CHUNK
    return int((chunk * (places * 2 + 1)).sum()) % _MODULUS
