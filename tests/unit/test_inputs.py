"""The shapes of sound that models take, by their config and first layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pytest_llmload.worker.model.inputs import check_inputs, prompt


def model(name: str, bins: int = 0, **config: Any) -> nn.Module:
    class Hears(nn.Module):  # type: ignore[misc]
        main_input_name = name

        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Module()
            self.encoder.conv1 = nn.Conv1d(bins or 1, 8, 3, dtype=torch.bfloat16)
            self.config = SimpleNamespace(is_encoder_decoder=True, **config)

        def forward(self, **inputs: Any) -> None:
            """Take a main input, and no token ids."""

    return Hears()


@pytest.mark.parametrize(
    ("name", "bins", "config", "shape"),
    [
        ("input_features", 80, {"num_mel_bins": 80, "max_source_positions": 100}, (2, 80, 200)),
        ("input_features", 1, {"input_feat_per_channel": 80, "max_source_positions": 6000}, (2, 128, 80)),
        ("input_features", 1, {"input_feat_per_channel": 80, "max_source_positions": 40}, (2, 40, 80)),
        ("input_features", 0, {"d_model": 64}, (2, 128, 64)),
        ("input_values", 0, {}, (2, 16000)),
        ("input_values", 1, {"num_mel_bins": 80}, (2, 128, 80)),
    ],
)
def test_sound_has_the_shape_that_the_model_takes(
    name: str, bins: int, config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    hears = model(name, bins, **config)
    loaded: Any = SimpleNamespace(model=hears, config=hears.config, job=None)
    assert check_inputs(loaded) == ""
    first, second = (prompt(loaded, torch.zeros(2, 4)) for _ in range(2))
    assert tuple(first[name].shape) == shape
    assert first[name].dtype == torch.bfloat16
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name][0], first[name][1])
