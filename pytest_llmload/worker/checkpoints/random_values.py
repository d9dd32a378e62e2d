"""Values of random checkpoints: a function of (format version, tensor name, shape), the same on every machine.

Element ``i`` of a tensor is a table entry chosen by 16 bits of a counter-based generator: lane ``i % 4`` of
SplitMix64 (Steele, Lea and Flood 2014) at counter ``i // 4``, keyed by the tensor's name and shape. The table has
65536 quantiles of a sum of six uniforms (near-gaussian, within 4.3 sigma), scaled for the tensor and rounded to its
dtype. Only integer arithmetic and IEEE operations that are exactly rounded are used, none of libm, whose last bit
differs between machines. Any range of elements can be computed alone, so threads and shards share no state.

The scales make the model behave like a trained one where it matters to a regression test: norms and biases are not
constant (a re-initialised one shows), queries and keys are amplified (a wrong rotary frequency shows), and a few
channels of each norm are far larger than the rest (activations above 6.0, so that the outlier path of LLM.int8 runs).
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Part of every key and of the weights digest. Increase it if any byte changes.
VERSION = 1

#: safetensors' names of the dtypes that can be generated -> bytes of an element.
FLOATING = {"F32": 4, "F16": 2, "BF16": 2}

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
#: Elements computed at a time, so few that the working set stays in a core's cache.
_BLOCK = 1 << 17

Bits = NDArray[Any]


@dataclass(frozen=True)
class Scale:
    """``mean + sigma * gaussian``; ``outlier`` replaces the mean in a few channels of a vector."""

    mean: float
    sigma: float
    outlier: float = 0.0


def scale_of(name: str, shape: tuple[int, ...]) -> Scale:
    """Return the distribution of a tensor's values, by its shape and transformers' conventions for module names."""
    module = name.rpartition(".")[0].rpartition(".")[2] if "." in name else name
    if len(shape) < 2:
        if re.search(r"norm|^ln|_ln", module) and not name.endswith("bias"):
            if re.search(r"^(q|k)_?(norm|ln)", module):
                return Scale(1.5, 0.2)
            return Scale(1.0, 0.2, outlier=6.0)
        return Scale(1.0, 0.2) if name.endswith("running_var") else Scale(0.0, 0.1)
    if re.search(r"embed_tokens|embed_in|wte|wpe|word_embeddings|^shared$|embeddings?$", module):
        # Small enough that tied output embeddings give logits of ordinary size.
        return Scale(0.0, 2.0 / math.sqrt(shape[-1]))
    # Conv1D of the GPT-2 family stores (in, out); everything else ends in the input dimension.
    inputs = shape[-2] if re.search(r"^c_(attn|fc|proj)$|^q_attn$", module) else shape[-1]
    if module == "lora_B":
        return Scale(0.0, 0.04)  # with alpha/r = 2 and unit inputs: about a fifth of the base's output
    gain = 1.0
    if re.search(r"^(q|k|query|key)(_proj)?$|query_key_value|c_attn|qkv", module):
        gain = 1.25
    elif re.search(r"^(gate|router)$", module):
        gain = 2.0  # fewer near-ties, so that rounding sends fewer tokens to other experts
    return Scale(0.0, gain / math.sqrt(inputs))


@functools.cache
def _gaussian() -> NDArray[np.float64]:
    """Return 65536 quantiles of the sum of six uniforms over 0..255, in units of its standard deviation."""
    uniform = np.ones(256, dtype=np.int64)
    counts = uniform
    for _ in range(5):
        counts = np.convolve(counts, uniform)
    below = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    targets = (2 * np.arange(1 << 16, dtype=np.int64) + 1) << 31  # of 2**48 outcomes
    cell = np.searchsorted(below, targets, side="right") - 1
    inside = (targets - below[cell]).astype(np.float64) / counts[cell].astype(np.float64)
    centred: NDArray[np.float64] = cell.astype(np.float64) + inside - 0.5 * len(counts)
    centred /= math.sqrt(6 * (256**2 - 1) / 12)
    return centred


def encode(values: NDArray[np.float64], dtype: str) -> Bits:
    """Return the stored bits of ``values``: little-endian, rounded to nearest even."""
    single = values.astype("<f4")
    if dtype == "F32":
        return single.view("<u4")
    if dtype == "F16":
        return single.astype("<f2").view("<u2")
    if dtype == "BF16":
        bits = single.view("<u4")
        rounded: Bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return rounded
    raise ValueError(f"no random values of dtype {dtype}: only {', '.join(FLOATING)}")


@functools.lru_cache(maxsize=64)
def _table(mean: float, sigma: float, dtype: str) -> Bits:
    return encode(mean + sigma * _gaussian(), dtype)


def _key(name: str, shape: tuple[int, ...]) -> int:
    text = f"{VERSION}|{name}|{'x'.join(map(str, shape))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@functools.cache
def _counters() -> NDArray[np.uint64]:
    counters: NDArray[np.uint64] = np.arange(1, _BLOCK // 4 + 1, dtype="<u8") * np.uint64(_GOLDEN)
    return counters


def _lanes(key: int, start: int, words: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
    """Fill ``words`` with SplitMix64 at the counters from ``start`` on; ``spare`` is scratch of the same size."""
    np.add(_counters()[: len(words)], np.uint64((key + start * _GOLDEN) & _MASK), out=words)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(words, np.uint64(shift), out=spare)
        np.bitwise_xor(words, spare, out=words)
        if factor is not None:
            np.multiply(words, np.uint64(factor), out=words)


def outlier_channels(size: int) -> list[int]:
    """Return the amplified channels of a norm over ``size``: the same ones in every layer, as in trained models."""
    key = _key("outlier channels", (size,))
    return sorted({(key >> (8 * i)) * 2654435761 % size for i in range(min(6, max(2, size // 128)))})


def bits(name: str, shape: tuple[int, ...], dtype: str, start: int = 0, stop: int | None = None) -> Bits:
    """Return the stored bits of elements ``start`` to ``stop`` (default: all) of a tensor, flat.

    ``start`` must be a multiple of 4. Raises ValueError for a dtype that is not floating.
    """
    total = math.prod(shape)
    stop = total if stop is None else stop
    scale, key = scale_of(name, shape), _key(name, shape)
    table = _table(scale.mean, scale.sigma, dtype)
    out = np.empty(-(-(stop - start) // 4) * 4, dtype=table.dtype)
    words = np.empty(min(_BLOCK, len(out)) // 4, dtype="<u8")
    spare = np.empty_like(words)
    for block in range(0, len(out), _BLOCK):
        count = min(_BLOCK, len(out) - block)
        _lanes(key, (start + block) // 4, words[: count // 4], spare[: count // 4])
        # Indices cannot leave the table; "clip" only spares numpy's checked, buffered path.
        np.take(table, words[: count // 4].view("<u2"), out=out[block : block + count], mode="clip")
    if scale.outlier and len(shape) == 1:
        channels = [channel for channel in outlier_channels(total) if start <= channel < stop]
        if channels:
            _amplify(out, channels, start, key, scale, dtype)
    return out[: stop - start]


def _amplify(out: Bits, channels: list[int], start: int, key: int, scale: Scale, dtype: str) -> None:
    table = _table(scale.outlier, scale.sigma * scale.outlier, dtype)
    word = np.empty(1, dtype="<u8")
    for channel in channels:
        _lanes(key, channel // 4, word, np.empty_like(word))
        out[channel - start] = table[int(word.view("<u2")[channel % 4])]
