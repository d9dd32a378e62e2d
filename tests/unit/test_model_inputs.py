"""The shapes of sound and images that models take, by their config and first layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from pytest_llmload.worker.model.generation import generate_ids, settings
from pytest_llmload.worker.model.inputs import check_inputs, forward_inputs, generate_inputs, named_inputs, prompt


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

        def generate(self, **inputs: Any) -> None:
            """Take the same."""

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
        # SpeechT5 hears waves and speaks spectra.
        ("input_values", 0, {"num_mel_bins": 80, "conv_kernel": [10, 3]}, (2, 16000)),
        ("input_features", 1, {"encoder_config": SimpleNamespace(num_mel_bins=40)}, (2, 128, 40)),
        # It writes while it hears.
        ("input_features", 0, {"num_mel_bins": 80, "audio_length_per_tok": 8}, (2, 80, 8 * 4)),
        ("pixel_values", 0, {"vision_config": SimpleNamespace(image_size=32, num_channels=1)}, (2, 1, 32, 32)),
        ("pixel_values", 0, {"encoder": SimpleNamespace(image_size=[16, 8])}, (2, 3, 16, 8)),
        ("flattened_patches", 0, {"vision_config": SimpleNamespace(patch_embed_hidden_size=48)}, (2, 16, 50)),
    ],
)
def test_sound_or_an_image_has_the_shape_that_the_model_takes(
    name: str, bins: int, config: dict[str, Any], shape: tuple[int, ...]
) -> None:
    hears = model(name, bins, **config)
    loaded: Any = SimpleNamespace(model=hears, config=hears.config, job=None, named_inputs=())
    assert check_inputs(loaded) == ""
    first, second = (prompt(loaded, torch.zeros(2, 4)) for _ in range(2))
    assert tuple(first[name].shape) == shape
    assert first[name].dtype == torch.bfloat16
    assert torch.equal(first[name], second[name])
    lasts = generate_inputs(loaded, torch.zeros(2, 4), new_tokens=3)[name]
    assert tuple(lasts.shape) == ((2, 80, 8 * 7) if "audio_length_per_tok" in config else shape)
    assert not torch.equal(first[name][0], first[name][1])


class Plays(nn.Module):  # type: ignore[misc]
    """Reads tokens in its forward, and hears while it generates, as Pop2Piano does."""

    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(is_encoder_decoder=True, d_model=64)
        self.generation_config = GenerationConfig(pad_token_id=0, num_beams=4, composer_to_feature_token={"one": 2})

    def forward(self, input_ids: Any, decoder_input_ids: Any = None) -> None:
        """Read."""

    def generate(self, input_features: Any, composer: str = "one", **settings: Any) -> None:
        """Hear."""


def test_a_class_whose_generate_takes_other_inputs_than_its_forward() -> None:
    plays = Plays()
    loaded: Any = SimpleNamespace(model=plays, config=plays.config, job=None, notes=[], named_inputs=())
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert check_inputs(loaded) == ""
    assert set(forward_inputs(loaded, ids)) == {"input_ids", "attention_mask", "decoder_input_ids"}
    given = generate_inputs(loaded, ids)
    assert {name: tuple(value.shape) for name, value in given.items()} == {"input_features": (2, 128, 64)}
    kept = settings(loaded, 3)
    assert kept.composer_to_feature_token == {"one": 2}
    assert (kept.pad_token_id, kept.num_beams) == (0, 1)


class Sees(nn.Module):  # type: ignore[misc]
    """Needs an image beside its prompt, and is told where in the prompt it stands."""

    main_input_name = "input_ids"

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(is_encoder_decoder=False, image_size=4, **config)

    def forward(self, input_ids: Any, pixel_values: Any, qformer_input_ids: Any) -> None:
        """Read and see."""


class Attends(Sees):
    def forward(self, input_ids: Any = None, pixel_values: Any = None, image_attention_mask: Any = None) -> None:
        """Read, and see images of which a mask says which token sees which."""


class Marks(Sees):
    def forward(self, input_ids: Any = None, pixel_values: Any = None, image_embeds_position_mask: Any = None) -> None:
        """Read and see, with a mask of the image's places."""


_IDS = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]])
_MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def inputs_of(model: nn.Module, *named: str) -> dict[str, Any]:
    loaded: Any = SimpleNamespace(model=model, config=model.config, job=None, named_inputs=named)
    assert check_inputs(loaded) == ""
    return {name: value.tolist() for name, value in prompt(loaded, _IDS, _MASK).items() if name != "pixel_values"} | {
        "pixel_values": tuple(prompt(loaded, _IDS)["pixel_values"].shape)
    }


def test_an_image_stands_after_the_first_token_of_each_row() -> None:
    reader = SimpleNamespace(vocab_size=4)
    assert inputs_of(Sees(image_token_id=9, num_query_tokens=2, qformer_config=reader)) == {
        "input_ids": [[1, 9, 9, 2, 3, 4], [0, 0, 5, 9, 9, 6]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
        "qformer_input_ids": [[1, 2, 3, 0], [0, 0, 1, 2]],
        "pixel_values": (2, 3, 4, 4),
    }
    # A video is four images, each with places of its own.
    video = inputs_of(Sees(video_token_id=8, num_query_tokens=1, qformer_config=reader))
    assert video["input_ids"] == [[1, 8, 8, 8, 8, 2, 3, 4], [0, 0, 5, 8, 8, 8, 8, 6]]
    assert video["pixel_values"] == (2, 4, 3, 4, 4)


def test_a_mask_says_where_an_image_stands_or_which_token_sees_it() -> None:
    assert inputs_of(Marks(latent_query_num=2), "pixel_values") == {
        "input_ids": [[1, 0, 0, 2, 3, 4], [0, 0, 5, 0, 0, 6]],
        "attention_mask": [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]],
        "image_embeds_position_mask": [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]],
        "pixel_values": (2, 3, 4, 4),
    }
    assert inputs_of(Attends(), "pixel_values") == {
        "input_ids": _IDS.tolist(),
        "attention_mask": _MASK.tolist(),
        "image_attention_mask": [[[1], [1], [1], [1]], [[0], [0], [1], [1]]],
        "pixel_values": (2, 1, 3, 4, 4),
    }


def test_an_error_names_the_input_that_a_class_cannot_run_without() -> None:
    sees = Attends()
    loaded: Any = SimpleNamespace(model=sees, config=sees.config, job=None, named_inputs=())
    assert "pixel_values" not in prompt(loaded, _IDS)
    assert named_inputs(loaded, ValueError("Exactly 1 of pixel_values or image_embeds has to be not-None.")) == (
        "pixel_values",
    )
    # Not taken by the forward, or made of the tokens.
    assert named_inputs(loaded, ValueError("give input_features, or input_ids")) == ()
    loaded.named_inputs = ("pixel_values",)
    assert named_inputs(loaded, ValueError("pixel_values have the wrong size")) == ()


def test_a_generation_that_needs_an_image_gets_one_without_a_forward_before() -> None:
    """A process that only times the model generates at once."""
    sees = Attends()
    calls = []

    def generate(input_ids: Any, attention_mask: Any, pixel_values: Any = None, **settings: Any) -> Any:
        calls.append(pixel_values is not None)
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        return torch.cat((input_ids, input_ids[:, :3]), dim=1)

    sees.generate = generate
    attached = SimpleNamespace(arguments=lambda rows, device: {})
    loaded: Any = SimpleNamespace(model=sees, config=sees.config, job=None, named_inputs=(), attached=attached)
    assert [generate_ids(loaded, _IDS, 3).tolist() for _ in range(2)] == [_IDS[:, :3].tolist()] * 2
    assert calls == [False, True, True]
    sees.generate = lambda **inputs: (_ for _ in ()).throw(ValueError("the prompt is too long"))
    with pytest.raises(ValueError, match="too long"):
        generate_ids(loaded, _IDS, 3)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ("self, state", "Other takes state, neither token ids nor sound nor an image"),
        ("self, pixel_values", "Other takes pixel_values and no token ids"),
    ],
)
def test_a_model_that_neither_reads_nor_writes_text_is_refused(parameters: str, said: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward({parameters}): ...", scope)
    main = parameters.split(", ")[1]
    other = type("Other", (nn.Module,), {"main_input_name": main, "forward": scope["forward"]})()
    other.config = SimpleNamespace(is_encoder_decoder=False)
    loaded: Any = SimpleNamespace(model=other, config=other.config, job=None, named_inputs=())
    assert check_inputs(loaded).startswith(said)
