"""Inputs of a model for given token ids: the ids, or sound or images where its prompt is not text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

from pytest_llmload.worker.model.loaded import Loaded

#: Parts of a config that say what the model hears or sees.
_PARTS = ("encoder_config", "audio_config", "vision_config", "encoder")
#: Fields of a config that say how many numbers a frame of a spectrum has.
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_size")
#: Samples of a wave: a second. Frames of a spectrum, where the model does not need a fixed number.
_SAMPLES, _FRAMES = 16000, 128
#: Inputs that are made from the token ids themselves.
_OF_TOKENS = ("input_ids", "attention_mask", "decoder_input_ids")
#: Patches of an image in each direction. Images of a video: as many as transformers' processors take.
_PATCHES, _IMAGES = 4, 4
#: Fields of a config that say how many positions of the prompt an image takes, or each image of a video.
_PLACES = ("num_query_tokens", "latent_query_num")
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
    sizes.insert(1, embedded_tokens(loaded))
    found = next((size for size in sizes if isinstance(size, int)), None)
    if found is None:
        raise ValueError(
            f"{type(loaded.model).__name__} has no vocab_size in its config and no table of token embeddings: no token "
            "ids can be made"
        )
    return found


def embedded_tokens(loaded: Loaded) -> int | None:
    """Return the number of rows of the input embedding; None if the model has no such table, or does not tell."""
    rows = getattr(_embeddings(loaded.model), "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _embeddings(model: Any) -> Any:
    try:
        found = model.get_input_embeddings()
        return found if isinstance(found, torch.nn.Module) else None
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
    own = generating_module(loaded.model)
    names = _beside_tokens(loaded)
    unknown = [name for name in names if name not in _MADE]
    if unknown:
        return (
            f"{type(own).__name__} takes {', '.join(unknown)}, neither token ids nor sound nor an image: "
            "pytest-llmload runs models that read or write text; measure the language model in it, or take auto_class()"
        )
    if "pixel_values" in names and not _reads(own) and not getattr(own.config, "is_encoder_decoder", False):
        return (
            f"{type(own).__name__} takes pixel_values and no token ids: pytest-llmload runs models that read or write "
            "text; measure the language model in it, or take auto_class()"
        )
    return ""


def prompt(loaded: Loaded, ids: Any, mask: Any = None, new_tokens: int = 0) -> dict[str, Any]:
    """Return the inputs of ``generate()`` for token ids, rows x positions, which so many new ones follow.

    A model that hears or sees gets so many rows of fixed random sound or images; its encoder sees no padding. One that
    also reads gets them only where its forward cannot be called without, and then its ids have places for the image
    after the first token, as a processor puts them there: the prompt is that much longer.
    """
    found = {}
    names = _beside_tokens(loaded)
    if _reads(loaded.model):
        padding = [0] * len(ids) if mask is None else (mask == 0).sum(dim=1).tolist()
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        if "pixel_values" in names:
            found = _with_places(loaded, found, padding)
    for name in names:
        found[name] = _MADE[name](loaded, name, ids, new_tokens)
    return found


def generate_inputs(loaded: Loaded, ids: Any, mask: Any = None, new_tokens: int = 0) -> dict[str, Any]:
    """Return the inputs of ``generate()``: those of a prompt, or others that a class's own ``generate`` names.

    A class may read tokens in its forward and hear while it generates.
    """
    required = required_by_generate(loaded.model)
    if not required or "input_ids" in inspect.signature(generating_module(loaded.model).generate).parameters:
        return prompt(loaded, ids, mask, new_tokens)
    return {name: _MADE[name](loaded, name, ids, new_tokens) for name in required}


def required_by_generate(model: Any) -> list[str]:
    """Return the sound or images that a class's own ``generate`` cannot be called without."""
    return [name for name in _required(generating_module(model).generate) if name in _MADE]


def forward_inputs(loaded: Loaded, ids: Any, mask: Any = None) -> dict[str, Any]:
    """Return the inputs of a forward for token ids, rows x positions: a decoder gets the ids too.

    A model that denoises gets the block of tokens that it begins with, which its class would choose at random.
    """
    inputs = prompt(loaded, ids, mask)
    if getattr(loaded.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    block = getattr(loaded.config, "canvas_length", None)
    if isinstance(block, int) and "decoder_input_ids" in _taken(loaded.model):
        inputs["decoder_input_ids"] = ids.repeat(1, -(-block // ids.shape[1]))[:, :block]
    return inputs


def named_inputs(loaded: Loaded, error: ValueError) -> tuple[str, ...]:
    """Return the input that a class cannot run without, though its forward names it as optional: as its error says.

    Empty if the error names no input that can be made and was not given.
    """
    words = re.findall(r"\w+", str(error))
    given = (*_OF_TOKENS, *_beside_tokens(loaded))
    taken = _taken(loaded.model)
    return next(((word,) for word in words if word in _MADE and word in taken and word not in given), ())


def generating_module(model: Any) -> Any:
    """Return the module whose forward a generation calls: below what an adapter library put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _taken(model: Any) -> list[str]:
    return list(inspect.signature(generating_module(model).forward).parameters)


def _required(function: Any) -> list[str]:
    """Return the parameters that a call must give."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(function).parameters.values()
    return [item.name for item in found if item.kind in named and item.default is item.empty]


def _reads(model: Any) -> bool:
    """Return true if token ids are the model's prompt: not where a decoder reads them that an image is encoded for."""
    own = generating_module(model)
    taken = _taken(model)
    main = getattr(own, "main_input_name", "input_ids")
    if main == "pixel_values" and getattr(own.config, "is_encoder_decoder", False):
        return False
    # A forward that passes all its arguments on names none.
    return "input_ids" in taken or main == "input_ids"


def _beside_tokens(loaded: Loaded) -> list[str]:
    """Return the inputs that a model needs beside token ids, or in their place."""
    own = generating_module(loaded.model)
    taken = _taken(own)
    needed = [name for name in _required(own.forward) if name not in _OF_TOKENS]
    needed += loaded.named_inputs
    if not _reads(own):
        # The wrapper of any two models takes its encoder's input under a name of its own.
        main = own.main_input_name
        needed.append("input_values" if main not in _MADE and "input_values" in taken else main)
    if "bbox" in taken and getattr(own.config, "is_encoder_decoder", False):
        # Of encoders alone, it has a default.
        needed.append("bbox")
    return list(dict.fromkeys(needed))


def _random(loaded: Loaded, *shape: int) -> Any:
    """Return random numbers, the same in every load, in the model's dtype and on its device."""
    random = torch.Generator().manual_seed(_SEED)
    own = next((param.dtype for param in loaded.model.parameters() if param.dtype.is_floating_point), torch.float32)
    return torch.randn(*shape, generator=random).to(device=input_device(loaded), dtype=own)


def _sound(loaded: Loaded, name: str, ids: Any, new_tokens: int) -> Any:
    return _random(loaded, len(ids), *_shape(loaded, name, ids.shape[1] + new_tokens))


def _image(loaded: Loaded, name: str, ids: Any, new_tokens: int) -> Any:
    """Return images of the size that the part which sees is made for: rows x channels x height x width.

    A video is rows x images x channels x height x width, and so is what a class takes that counts images by token.
    """
    size = _field(loaded.config, ("image_size",)) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _field(loaded.config, ("num_channels", "in_channels")) or 3
    counted = (_images(loaded),) if _is_video(loaded) or "image_attention_mask" in _taken(loaded.model) else ()
    return _random(loaded, len(ids), *counted, channels, height, width)


def _is_video(loaded: Loaded) -> bool:
    """Return true if a model's config has a token for videos and none for images."""
    tokens = [getattr(loaded.config, f"{kind}_token_id", None) for kind in ("video", "image")]
    return isinstance(tokens[0], int) and tokens[1] is None


def _images(loaded: Loaded) -> int:
    return _IMAGES if _is_video(loaded) else 1


def _with_places(loaded: Loaded, text: dict[str, Any], padding: list[int]) -> dict[str, Any]:
    """Return token ids with an image's places after the first one of each row, their mask, and where the places are.

    ``padding`` are the tokens on the left of each row that are none. A class knows the places by a token of their own
    or by a mask; one that attends to images takes none of the prompt, and a mask of which token sees which image.
    """
    taken = _taken(loaded.model)
    kind = "video" if _is_video(loaded) else "image"
    token = getattr(loaded.config, f"{kind}_token_id", None)
    count = (_field(loaded.config, _PLACES) or 0) * _images(loaded)
    if not isinstance(token, int) and "image_embeds_position_mask" not in taken:
        count = 0
    ids, mask = text["input_ids"], text["attention_mask"]
    image = ids.new_full((count,), token if isinstance(token, int) else 0)
    rows = [torch.cat((row[: left + 1], image, row[left + 1 :])) for row, left in zip(ids, padding, strict=True)]
    found = {"input_ids": torch.stack(rows), "attention_mask": torch.cat((mask, mask.new_ones(len(ids), count)), dim=1)}
    if "image_embeds_position_mask" in taken:
        places = torch.zeros_like(found["input_ids"])
        for row, left in enumerate(padding):
            places[row, left + 1 : left + 1 + count] = 1
        found["image_embeds_position_mask"] = places
    if "image_attention_mask" in taken:
        found["image_attention_mask"] = found["attention_mask"][..., None].expand(-1, -1, _images(loaded))
    return found


def _patches(loaded: Loaded, name: str, ids: Any, new_tokens: int) -> Any:
    """Return the patches of images: rows x patches x numbers, of which the first two are the patch's row and column."""
    places = torch.cartesian_prod(torch.arange(_PATCHES), torch.arange(_PATCHES))
    pixels = _random(loaded, len(ids), len(places), _field(loaded.config, ("patch_embed_hidden_size",)) or 768)
    return torch.cat([places.to(pixels).expand(len(ids), -1, -1), pixels], dim=-1)


def _boxes(loaded: Loaded, name: str, ids: Any, new_tokens: int) -> Any:
    """Return where each token stands on its page, by four edges: all at its origin."""
    return torch.zeros(*ids.shape, 4, device=ids.device)


def _instruction(loaded: Loaded, name: str, ids: Any, new_tokens: int) -> Any:
    """Return the prompt for the part that looks at the image with it, which has a vocabulary of its own."""
    return ids % loaded.config.qformer_config.vocab_size


#: Input -> how it is made from the token ids in whose place, or beside which, it is given, and the number of new ones.
_MADE: dict[str, Callable[[Loaded, str, Any, int], Any]] = {
    **dict.fromkeys(("input_features", "input_values"), _sound),
    "pixel_values": _image,
    "flattened_patches": _patches,
    "bbox": _boxes,
    "qformer_input_ids": _instruction,
}


def _field(config: Any, names: tuple[str, ...]) -> Any:
    """Return the first field of a config, or of the part of it that hears or sees, that has one of some names."""
    parts = [config, *(getattr(config, part, None) for part in _PARTS)]
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if isinstance(value, (int, list, tuple))), None)


def _shape(loaded: Loaded, name: str, tokens: int) -> tuple[int, ...]:
    """Return the shape of one row: samples, or frames and the numbers of each in the order of the class.

    A class that writes while it hears takes sound of exactly as many tokens as there are.
    """
    config = loaded.config
    bins = _field(config, _BINS)
    if not bins or (name == "input_values" and not _takes_spectra(loaded)):
        hidden = getattr(config, "d_model", None) if name == "input_features" else None
        return (_FRAMES, hidden) if hidden else (_SAMPLES,)
    if isinstance(frames := getattr(config, "audio_length_per_tok", None), int):
        return (bins, frames * tokens)
    positions = getattr(config, "max_source_positions", None)
    modules = loaded.model.named_modules()
    first = next((module for path, module in modules if path.endswith("encoder.conv1")), None)
    if getattr(first, "in_channels", None) == bins and isinstance(positions, int):
        # Whisper's encoder takes spectra of one length only, frames last.
        return (bins, 2 * positions)
    return (min(_FRAMES, positions) if isinstance(positions, int) else _FRAMES, bins)


def _takes_spectra(loaded: Loaded) -> bool:
    """Return true unless convolutions over the samples of a wave come first, as the config says."""
    return not getattr(loaded.config, "conv_kernel", None)
