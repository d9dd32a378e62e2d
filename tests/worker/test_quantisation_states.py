"""Quantisation states of bitsandbytes, each against the library's own answer."""

from __future__ import annotations

import pytest
import torch

from pytest_llmload.quantisation.bitsandbytes import StoredFourBit, scheme_of
from pytest_llmload.quantisation.stored import stored_weights
from pytest_llmload.worker.model.tensors import Inventory


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_our_dequantisation_is_the_librarys(scheme: str, nested: bool, storage: torch.dtype) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    module = bitsandbytes.nn.Linear4bit(
        256, 192, bias=False, compress_statistics=nested, quant_type=scheme, quant_storage=storage
    ).to("cpu")
    (weight,) = stored_weights(module)
    assert isinstance(weight, StoredFourBit)
    assert (weight.scheme, weight.shape, weight.is_nested) == (scheme, (192, 256), nested)
    expected = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).reshape(-1)
    for start, stop in ((0, 64), (100 * 64, 103 * 64), (192 * 256 - 64, 192 * 256), (63, 131)):
        torch.testing.assert_close(weight.dequantised(start, stop), expected[start:stop].float(), rtol=1e-5, atol=1e-7)
    # Blocks of both halves of the nested statistics.
    numbers = [0, 3, 300, 767]
    each = torch.stack([weight.dequantised(number * 64, (number + 1) * 64) for number in numbers])
    assert torch.equal(weight.dequantised_blocks(numbers), each)


def test_our_int8_dequantisation_is_the_librarys() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    module = bitsandbytes.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0).to("cpu")
    expected = bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).reshape(-1)
    for _ in range(2):
        (weight,) = stored_weights(module)
        torch.testing.assert_close(weight.dequantised(200, 500), expected[200:500].float())
        torch.testing.assert_close(weight.dequantised_blocks([0, 63]), expected.reshape(64, 128)[[0, 63]].float())
        assert weight.describe() == "int8 scale=float32 threshold=6"
        # The first forward moves the scales from the parameter to the module's state.
        module(torch.zeros(1, 128, dtype=torch.float16))


def test_a_dense_weight_has_no_state() -> None:
    inventory = Inventory(torch.nn.Linear(4, 4))
    assert [held.name for held in inventory.held] == ["weight", "bias"]
    assert [inventory.stored(held) for held in inventory.held] == [None, None]


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_are_those_of_the_library(scheme: str) -> None:
    from bitsandbytes.functional import get_4bit_type

    assert scheme_of(get_4bit_type(scheme, device="cpu")) == scheme
    assert scheme_of(get_4bit_type("af4", device="cpu")) == ""
