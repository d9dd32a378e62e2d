"""The checksum that a GPU takes of its tensors, by the arithmetic of Python's own integers."""

from __future__ import annotations

import pytest
import torch

from pytest_llmload.worker.model.checksums import word_sum

WRAPS = 1 << 64


def expected(raw: bytes) -> int:
    whole = len(raw) // 8 * 8
    words = (int.from_bytes(raw[start : start + 8], "little") for start in range(0, whole, 8))
    total = sum(word * (2 * number + 1) for number, word in enumerate(words))
    return (total + int.from_bytes(raw[whole:], "little") * 0x9E3779B97F4A7C15) % WRAPS


@pytest.mark.parametrize("begin", [0, 3, 8])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 13, 800])
def test_every_byte_counts(size: int, begin: int) -> None:
    stored = torch.randint(0, 256, (begin + size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))
    tensor = stored[begin:]

    assert int(word_sum(tensor)) % WRAPS == expected(bytes(tensor.tolist()))


def test_a_tensor_of_more_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llmload.worker.model.checksums._CHUNK", 4)
    tensor = torch.randn(5, 7)
    swapped = tensor[[1, 0, 2, 3, 4]]

    assert int(word_sum(tensor)) % WRAPS == expected(tensor.numpy().tobytes())
    assert int(word_sum(swapped)) != int(word_sum(tensor))
