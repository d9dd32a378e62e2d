"""Inputs of a model for given token ids: the ids, or sound of its main input's shape where it does not read text."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from pytest_llmload.worker.model.loaded import Loaded

#: Main inputs of models that hear: spectra, and samples of a wave or spectra.
_SOUND = ("input_features", "input_values")
#: Fields of a config that say how many numbers a frame of a spectrum has.
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_size")
#: Samples of a wave: a second. Frames of a spectrum, where the model does not need a fixed number.
_SAMPLES, _FRAMES = 16000, 128
#: Seed of the random features.
_SEED = 20
#: Fields of a config that bound token ids, for models without a table of them.
_BOUNDS = ("vocab_size", "num_hash_buckets")


def vocabulary(loaded: Loaded) -> int:
    """Return the number of different token ids: as the config says, else the rows of the input embedding.

    A model that hashes characters has neither, and takes every id below its number of buckets. Raises ValueError if
    nothing says it.
    """
    sizes = [getattr(loaded.text_config, name, None) for name in _BOUNDS]
    sizes.insert(1, getattr(_embeddings(loaded.model), "num_embeddings", None))
    found = next((size for size in sizes if isinstance(size, int)), None)
    if found is None:
        raise ValueError(
            f"{type(loaded.model).__name__} has no vocab_size in its config and no table of token embeddings: no token "
            "ids can be made"
        )
    return found


def _embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        # Not every class has tokens.
        return None


def input_device(loaded: Loaded) -> Any:
    """Return the device of the model's first weights; hooks move its inputs on from there."""
    for part in (_embeddings(loaded.model), loaded.model):
        for param in part.parameters() if part is not None else ():
            if param.device.type != "meta":
                return param.device
    return torch.device("cuda:0" if loaded.job.device.kind == "cuda" else "cpu")


def check_inputs(loaded: Loaded) -> str:
    """Return why no inputs can be made for the model; empty if they can."""
    name = _main_input(loaded.model)
    if name == "input_ids" or name in _SOUND:
        return ""
    return (
        f"{type(loaded.model).__name__} takes {name}, neither token ids nor sound: pytest-llmload runs models that "
        "read text or hear; measure the language model in it, or take auto_class()"
    )


def prompt(loaded: Loaded, ids: Any, mask: Any = None) -> dict[str, Any]:
    """Return the inputs of ``generate()`` for token ids, rows x positions.

    A model that hears gets so many rows of fixed random sound; its encoder sees no padding.
    """
    name = _main_input(loaded.model)
    if name == "input_ids":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    return {name: _sound(loaded, name, len(ids))}


def forward_inputs(loaded: Loaded, ids: Any, mask: Any = None) -> dict[str, Any]:
    """Return the inputs of a forward for token ids, rows x positions: a decoder gets the ids too."""
    inputs = prompt(loaded, ids, mask)
    if getattr(loaded.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _main_input(model: Any) -> str:
    """Return the name of a model's main input; token ids if it takes them at all."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "input_ids" in inspect.signature(own.forward).parameters:
        return "input_ids"
    return str(getattr(own, "main_input_name", "input_ids"))


def _sound(loaded: Loaded, name: str, rows: int) -> Any:
    """Return random features, the same in every load, in the model's dtype and on its device."""
    random = torch.Generator().manual_seed(_SEED)
    values = torch.randn(rows, *_shape(loaded, name), generator=random)
    own = next((param.dtype for param in loaded.model.parameters() if param.dtype.is_floating_point), torch.float32)
    return values.to(device=input_device(loaded), dtype=own)


def _shape(loaded: Loaded, name: str) -> tuple[int, ...]:
    """Return the shape of one row: samples, or frames and the numbers of each in the order of the class."""
    config = loaded.config
    bins = next((size for field in _BINS if isinstance(size := getattr(config, field, None), int)), 0)
    if not bins:
        hidden = getattr(config, "d_model", None) if name == "input_features" else None
        return (_FRAMES, hidden) if hidden else (_SAMPLES,)
    positions = getattr(config, "max_source_positions", None)
    modules = loaded.model.named_modules()
    first = next((module for path, module in modules if path.endswith("encoder.conv1")), None)
    if getattr(first, "in_channels", None) == bins and isinstance(positions, int):
        # Whisper's encoder takes spectra of one length only, frames last.
        return (bins, 2 * positions)
    return (min(_FRAMES, positions) if isinstance(positions, int) else _FRAMES, bins)
