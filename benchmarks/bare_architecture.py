"""Build, save, load, run and generate with a tiny model, as a script without the plugin would.

python benchmarks/bare_architecture.py MODEL_TYPE FAMILY
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiny_configs

STEPS = ("config", "build", "save", "load", "forward", "generate")


def inputs(model: Any, length: int = 16) -> dict[str, Any]:
    """Return inputs for a forward: token ids, or what the model's main input is."""
    import torch

    torch.manual_seed(0)
    name = getattr(model, "main_input_name", "input_ids")
    ids = torch.arange(64, 64 + length)[None]
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name != "input_ids":
        found = {name: _features(model, name)}
    if getattr(model.config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids
    return found


def _features(model: Any, name: str) -> Any:
    import torch

    config = model.config
    if name in ("input_features", "input_values"):
        bins = next(
            (getattr(config, key) for key in ("num_mel_bins", "input_feat_per_channel") if hasattr(config, key)), 0
        )
        length = 2 * getattr(config, "max_source_positions", 64)
        if not bins:
            return torch.randn(1, 16000)
        return torch.randn(1, bins, length) if "Whisper" in type(model).__name__ else torch.randn(1, length, bins)
    if name == "pixel_values":
        size = getattr(getattr(config, "vision_config", config), "image_size", 32)
        return torch.randn(1, 3, size, size)
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
        model = auto.from_pretrained(folder / "saved").eval()
        done["steps"].append(step)
        step = "forward"
        done["input"] = getattr(model, "main_input_name", "input_ids")
        with torch.no_grad():
            given = inputs(model)
            model(**given)
        done["steps"].append(step)
        step = "generate"
        if hasattr(model, "generate") and model.can_generate():
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
