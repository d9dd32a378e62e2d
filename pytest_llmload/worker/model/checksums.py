"""A checksum of every byte of the stored weights, taken on the device that they lie on."""

from __future__ import annotations

import os
import re
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pytest_llmload.worker.model.tensors import Held, Inventory

#: Words of 8 bytes that are summed at once on a GPU.
_CHUNK = 1 << 22
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
_MODULUS = 1 << 64
#: What the bytes after the last word are multiplied by: an odd number, as a signed word.
_TAIL = 0x9E3779B97F4A7C15 - _MODULUS


def checksums(inventory: Inventory) -> dict[str, str]:
    """Return one checksum for the tensors whose paths differ in their numbers only; two swapped rows change it.

    Parameters and persistent buffers in memory; packed values of quantised weights as they are stored.
    """
    weights = [held for held in inventory.distinct() if _is_weight(held)]
    values: dict[str, int] = {}
    # zlib releases the interpreter's lock while it reads.
    on_host = [held for held in weights if held.tensor.device.type == "cpu"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        values |= zip((held.path for held in on_host), threads.map(_on_host, on_host), strict=True)
    # The sums of a device come to the host in one copy, once all are being computed.
    sums: dict[Any, dict[str, Any]] = defaultdict(dict)
    for held in weights:
        if held.tensor.device.type != "cpu":
            sums[held.tensor.device][held.path] = word_sum(held.tensor)
    for of_device in sums.values():
        values |= zip(of_device, torch.stack([*of_device.values()]).tolist(), strict=True)
    found: dict[str, int] = defaultdict(int)
    for held in weights:
        key = _NUMBER.sub("*", held.path)
        place = zlib.crc32(held.path.encode()) | 1
        found[key] = (found[key] + place * values[held.path]) % _MODULUS
    return {name: f"{value:016x}" for name, value in sorted(found.items())}


def _is_weight(held: Held) -> bool:
    return held.in_state_dict and held.tensor is not None and held.nbytes > 0


def _on_host(held: Held) -> int:
    return zlib.crc32(_raw(held.tensor).numpy().data)


def _raw(tensor: Any) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def word_sum(tensor: Any) -> Any:
    """Return the sum of a tensor's words of 8 bytes, each times an odd number: a signed scalar on the tensor's device.

    The arithmetic wraps at 64 bit.
    """
    raw = _raw(tensor)
    whole = raw.numel() // 8 * 8
    # A tensor that does not begin at a multiple of 8 bytes cannot be looked at as words.
    words = raw[:whole].view(torch.int64) if not raw.storage_offset() % 8 else raw[:whole].clone().view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for number, chunk in enumerate(words.split(_CHUNK) if whole else ()):
        total += _weighted(chunk, number)
    if whole < raw.numel():
        tail = raw[whole:].to(torch.int64) << 8 * torch.arange(raw.numel() - whole, device=raw.device)
        total += tail.sum() * _TAIL
    return total


def _weighted(chunk: Any, number: int) -> Any:
    """Return the sum of the words, each times an odd number that depends on its place."""
    places = torch.arange(chunk.numel(), device=chunk.device, dtype=torch.int64) + number * _CHUNK
    return (chunk * (places * 2 + 1)).sum()
