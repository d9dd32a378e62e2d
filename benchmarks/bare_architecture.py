"""Build, save, load, run and generate with a tiny model, as a script without the plugin would.

python benchmarks/bare_architecture.py MODEL_TYPE FAMILY
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny_configs


def inputs(model: Any, length: int = 16, asked: str = "", further: int = 0) -> dict[str, Any]:
    """Return inputs for a forward: token ids, and what else the model's class cannot do without.

    ``asked`` is the text of an error that names an input which is optional by the forward's signature, ``further`` the
    number of tokens that are generated.
    """
    import torch

    torch.manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    ids = torch.arange(64, 64 + length)[None]
    decodes = getattr(model.config, "is_encoder_decoder", False)
    found = {}
    if "input_ids" in taken and not (decodes and main == "pixel_values"):
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    required = [name for name, each in taken.items() if each.default is each.empty and each.kind != each.VAR_KEYWORD]
    required += [name for name in ("pixel_values", "input_features") if name in asked and name in taken]
    if not found:
        required.append("input_values" if "input_values" in taken else main)
    if decodes and "bbox" in taken:
        required.append("bbox")
    found |= {name: _features(model, name, ids) for name in required if name not in found}
    if hasattr(model.config, "audio_length_per_tok"):
        # It writes while it hears: as many tokens as the sound has.
        frames = model.config.audio_length_per_tok * (length + further)
        found |= {name: torch.randn(1, value.shape[2], frames) for name, value in found.items() if "features" in name}
    if "pixel_values" in found and "input_ids" in found:
        found |= _image_in_text(model, ids, found["pixel_values"])
    if decodes:
        found["decoder_input_ids"] = ids
    return found


def _image_in_text(model: Any, ids: Any, pixels: Any) -> dict[str, Any]:
    """Return what processors make of a prompt with an image: ids in its places, a mask of them, and more axes."""
    import torch

    config, taken = model.config, inspect.signature(model.forward).parameters
    image, video = (getattr(config, f"{kind}_token_id", None) for kind in ("image", "video"))
    if "image_attention_mask" in taken:
        return {"pixel_values": pixels[:, None], "image_attention_mask": torch.ones(*ids.shape, 1)}
    pixels, frames = (pixels, 1) if image is not None or video is None else (torch.stack([pixels] * 4, dim=1), 4)
    masked = "image_embeds_position_mask" in taken
    if image is None and video is None and not masked:
        return {}
    count = getattr(config, "latent_query_num" if masked else "num_query_tokens") * frames
    places = torch.full((1, count), 0 if masked else image if frames == 1 else video)
    ids = torch.cat([ids[:, :1], places, ids[:, 1:]], dim=1)
    found = {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if masked:
        found["image_embeds_position_mask"] = torch.zeros_like(ids)
        found["image_embeds_position_mask"][:, 1 : 1 + count] = 1
    return found


def _features(model: Any, name: str, ids: Any) -> Any:
    import torch

    config = model.config
    if name == "qformer_input_ids":
        return ids
    if name == "bbox":
        return torch.zeros(*ids.shape, 4)
    parts = [config, *(getattr(config, part, None) for part in ("encoder_config", "audio_config", "vision_config"))]
    if name == "input_values":
        return torch.randn(1, 16000)
    if name == "input_features":
        bins = next(
            (getattr(part, key) for part in parts for key in ("num_mel_bins", "input_feat_per_channel")
             if hasattr(part, key)), 0
        )  # fmt: skip
        length = 2 * getattr(config, "max_source_positions", 64)
        if not bins:
            return torch.randn(1, length, config.d_model)
        return torch.randn(1, bins, length) if "Whisper" in type(model).__name__ else torch.randn(1, length, bins)
    if name == "pixel_values":
        size = next((part.image_size for part in (*parts[1:], getattr(config, "encoder", None), config)
                     if hasattr(part, "image_size")), 32)  # fmt: skip
        return torch.randn(1, 3, *(size if isinstance(size, list | tuple) else (size, size)))
    if name == "flattened_patches":
        # The place of each patch, its row and column, before its pixels.
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
        return torch.cat([places, torch.randn(1, 16, config.vision_config.patch_embed_hidden_size)], dim=-1)
    raise ValueError(f"no input is known for {name}")


def attempt(model_type: str, family: str, folder: Path) -> dict[str, Any]:
    """Return how far the library gets with a model type, and the first error."""
    import torch
    import transformers

    done: dict[str, Any] = {"steps": [], "error": ""}
    step = "config"
    try:
        config_dict = tiny_configs.tiny(model_type, family)
        (folder / "config.json").write_text(json.dumps(config_dict, indent=1, default=str))
        config = transformers.AutoConfig.from_pretrained(folder)
        done["steps"].append(step)
        step = "build"
        torch.manual_seed(0)
        auto = getattr(transformers, tiny_configs.FAMILIES[family][1])
        model = auto.from_config(config).eval()
        done["class"], done["elements"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        done["steps"].append(step)
        step = "save"
        model.save_pretrained(folder / "saved")
        done["steps"].append(step)
        step = "load"
        model, info = auto.from_pretrained(folder / "saved", output_loading_info=True)
        lost = sorted(info["missing_keys"])
        if lost:
            raise RuntimeError(f"{len(lost)} tensors that it saved itself are missing after loading, as {lost[0]}")
        model = model.eval()
        done["steps"].append(step)
        step = "forward"
        done["input"] = getattr(model, "main_input_name", "input_ids")
        with torch.no_grad():
            asked = ""
            try:
                model(**inputs(model))
            except ValueError as error:
                asked = str(error)
                model(**inputs(model, asked=asked))
        done["steps"].append(step)
        step = "generate"
        if hasattr(model, "generate") and model.can_generate():
            given = inputs(model, asked=asked, further=4)
            given.pop("decoder_input_ids", None)
            lengths = {"min_new_tokens": 4, "max_new_tokens": 4}
            start = {"decoder_start_token_id": 0} if getattr(config, "is_encoder_decoder", False) else {}
            model.generate(**given, **lengths, **start, do_sample=False, num_beams=1, pad_token_id=0)
            done["steps"].append(step)
    except Exception as error:  # noqa: BLE001 - whatever a model's code raises is the answer
        text = " ".join(str(error).split())
        done["error"] = f"{step}: {type(error).__name__}: {text[:300]}"
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(attempt(sys.argv[1], sys.argv[2], Path(place))))
