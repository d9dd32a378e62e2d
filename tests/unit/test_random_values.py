"""Random values are the same bytes everywhere, and distributed so that faults show."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from pytest_llmload.worker.checkpoints import random_values

PROJECTION = ("model.layers.0.mlp.up_proj.weight", (1024, 512))
NORM = ("model.layers.0.input_layernorm.weight", (512,))


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return random_values.bits(name, shape, "F32").view("<f4").astype("f8").reshape(shape)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "sha256"),
    [
        (*PROJECTION, "BF16", "b89734dbf37fffd1"),
        (*PROJECTION, "F16", "32a4417c54bda863"),
        (*PROJECTION, "F32", "d9012f34e01fa755"),
        (*NORM, "BF16", "49939a26f28fba94"),
        ("transformer.h.1.attn.c_attn.bias", (1152,), "F16", "8c26f85aaf151748"),
    ],
)
def test_the_bytes_are_those_of_version_1(name: str, shape: tuple[int, ...], dtype: str, sha256: str) -> None:
    """A change here changes every recorded fingerprint: raise ``random_values.VERSION`` with it."""
    assert random_values.VERSION == 1
    assert hashlib.sha256(random_values.bits(name, shape, dtype).tobytes()).hexdigest()[:16] == sha256


@pytest.mark.parametrize("name_shape", [PROJECTION, NORM])
@pytest.mark.parametrize(("start", "stop"), [(0, 5), (4, 12), (128, 131), (300, 512)])
def test_any_range_can_be_computed_alone(name_shape: tuple[str, tuple[int, ...]], start: int, stop: int) -> None:
    whole = random_values.bits(*name_shape, "F16")
    assert np.array_equal(random_values.bits(*name_shape, "F16", start, stop), whole[start:stop])


def test_a_range_across_the_block_limit_agrees_with_the_whole() -> None:
    name, shape = "model.layers.0.mlp.up_proj.weight", (3, 1 << 16)
    edge = random_values._BLOCK
    whole = random_values.bits(name, shape, "BF16")
    assert np.array_equal(random_values.bits(name, shape, "BF16", edge - 8, edge + 8), whole[edge - 8 : edge + 8])


def test_neither_rows_nor_tensors_repeat() -> None:
    one = numbers(*PROJECTION)
    assert len({row.tobytes() for row in one}) == len(one)
    other = numbers("model.layers.1.mlp.up_proj.weight", PROJECTION[1])
    reshaped = numbers(PROJECTION[0], (512, 1024))
    for stranger in (other, reshaped.reshape(1024, 512)):
        assert abs(np.corrcoef(one.ravel(), stranger.ravel())[0, 1]) < 0.01
    assert np.abs(np.corrcoef(one[:64])[np.triu_indices(64, 1)]).max() < 0.25


def test_projections_are_near_gaussian_with_unit_gain() -> None:
    scaled = numbers(*PROJECTION) * np.sqrt(512)
    assert abs(scaled.mean()) < 0.01
    assert scaled.std() == pytest.approx(1, rel=0.01)
    assert (scaled**4).mean() / scaled.std() ** 4 == pytest.approx(2.8, abs=0.05)


def test_norms_and_biases_are_not_constant_and_norms_have_outliers() -> None:
    norm = numbers(*NORM)
    outliers = random_values.outlier_channels(512)
    assert norm[outliers].min() > 3
    usual = np.delete(norm, outliers)
    assert usual.std() == pytest.approx(0.2, rel=0.15)
    assert usual.max() < 2
    assert numbers("model.layers.0.self_attn.q_proj.bias", (512,)).std() == pytest.approx(0.1, rel=0.15)


def test_outliers_are_the_same_channels_in_every_layer() -> None:
    later = numbers("model.layers.7.post_attention_layernorm.weight", (512,))
    channels = random_values.outlier_channels(512)
    assert set(np.argsort(later)[-len(channels) :]) == set(channels)


@pytest.mark.parametrize(("name", "gain"), [("q_proj", 1.25), ("v_proj", 1.0)])
def test_queries_and_keys_are_amplified(name: str, gain: float) -> None:
    weight = numbers(f"model.layers.0.self_attn.{name}.weight", (512, 512))
    assert weight.std() * np.sqrt(512) == pytest.approx(gain, rel=0.01)


def test_conv1d_weights_are_scaled_by_their_first_dimension() -> None:
    weight = numbers("transformer.h.0.mlp.c_fc.weight", (384, 1536))
    assert weight.std() * np.sqrt(384) == pytest.approx(1, rel=0.01)


def test_half_precision_is_rounded_as_torch_rounds() -> None:
    exact = np.random.default_rng(1).normal(size=100_000)
    single = torch.from_numpy(exact.astype("f4"))
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        ours = torch.from_numpy(random_values.encode(exact, name).view("<i2").copy())
        assert torch.equal(ours, single.to(dtype).view(torch.int16))


def test_other_dtypes_have_no_values() -> None:
    with pytest.raises(ValueError, match="no random values of dtype I64"):
        random_values.bits("position_ids", (4,), "I64")
