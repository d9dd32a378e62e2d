"""Cut the config of a model to its first layers: every count of layers, and every list that has an entry a layer."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import MachineError

#: What architectures call the number of their layers, beside the name that their class maps ``num_hidden_layers`` to.
_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_encoder_layers",
    "decoder_layers", "encoder_layers",
)  # fmt: skip
#: Lists that may have as many entries as the model has layers and yet are not about its layers.
_OTHER_LISTS = re.compile(r"token|architectures|languages|auto_map")
#: Lists of layers' numbers: ``cross_attention_layers``, ``mlp_only_layers``, ``attn_layer_indices``.
_NUMBERS = re.compile(r"layers?(_|$)|_idxs?$|_ind(ex|ices|exes)$")
_TEXTS = re.compile(r"pattern")


def cut_config(
    config: dict[str, Any], directory: Path, layers: int, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return a config.json with only the first ``layers`` decoder layers, and encoder layers where there are both.

    Towers for pictures and sounds stay whole. ``directory`` holds the config and the code that it brings. Raises
    MachineError, in one sentence, where nothing can be cut.
    """
    found = copy.deepcopy(config)
    counts = [count for part in _parts(found, _read(directory, trust_remote_code)) for count in _cut(*part, layers)]
    if not counts:
        raise MachineError(f"{_name(config)} says nowhere how many layers it has, so it cannot be cut to {layers}")
    if max(counts) <= layers:
        raise MachineError(
            f"{_name(config)} has {max(counts)} layers, and a cut to {layers} leaves none of them out: load fewer "
            "layers, or for the whole model"
        )
    return found


def layer_count(directory: Path, *, trust_remote_code: bool = False) -> int:
    """Return how many layers the longest stack of a model has that :func:`cut_config` would cut; 0 if it has none."""
    config = _read(directory, trust_remote_code)
    counts = [count for part in _parts({}, config) for count in _counts(part[1]).values()]
    return max(counts, default=0)


def cut_dict(config: dict[str, Any], layers: int, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return :func:`cut_config` of a config that stands in no folder yet."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return cut_config(config, Path(folder), layers, trust_remote_code=trust_remote_code)


def _name(config: dict[str, Any]) -> str:
    return f"the config of model type {config.get('model_type')!r}"


def _read(directory: Path, trust_remote_code: bool) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config can fail anywhere in a model's own code
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MachineError(
            f"transformers {transformers.__version__} cannot read the model's config: {first}"
        ) from error


def _parts(data: dict[str, Any], config: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield the parts of a config that read tokens, each as config.json has it and as transformers reads it."""
    if hasattr(config, "vocab_size"):
        yield data, config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and part is not config:
            below = data.get(name)
            if not isinstance(below, dict):
                # The class fills it with its defaults; what is cut has to be written.
                below = {}
                yield from _written(data, name, below, part)
            else:
                yield from _parts(below, part)


def _written(data: dict[str, Any], name: str, below: dict[str, Any], part: Any) -> Iterator[tuple[dict[str, Any], Any]]:
    for found in _parts(below, part):
        data[name] = below
        yield found


def _counts(config: Any) -> dict[str, int]:
    """Return the counts of layers of one part, by the names that its class has for them."""
    mapped = (getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers")
    values = {name: getattr(config, name, None) for name in (mapped, *_COUNTS)}
    return {name: value for name, value in values.items() if isinstance(value, int) and not isinstance(value, bool)}


def _cut(data: dict[str, Any], config: Any, layers: int) -> list[int]:
    """Cut one part of a config.json in place; return the counts that it had."""
    counts = _counts(config)
    mapped = next(iter(counts), "")
    for name, count in counts.items():
        if count > layers and (name in data or name == mapped):
            data[name] = layers
    longest = max(counts.values(), default=0)
    if longest > layers:
        for name, value in list(data.items()):
            data[name] = _cut_value(name, value, set(counts.values()), longest, layers)
    return list(counts.values())


def _cut_value(name: str, value: Any, counts: set[int], longest: int, layers: int) -> Any:
    """Return a field without the layers that are left out: one with an entry a layer, or one of layers' numbers."""
    if _TEXTS.search(name) and isinstance(value, str) and len(value) in counts:
        return value[:layers]
    if not isinstance(value, list) or not value or _OTHER_LISTS.search(name):
        return value
    if len(value) in counts:
        return value[:layers]
    if all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) for pair in value):
        # GPT-Neo's attention_types: patterns, each with how often it is repeated.
        spelled = [kind for kinds, times in value for _ in range(int(times)) for kind in kinds]
        return [[spelled[:layers], 1]] if len(spelled) in counts else value
    is_numbers = all(isinstance(number, int) and 0 <= number < longest for number in value)
    if _NUMBERS.search(name) and is_numbers and value == sorted(set(value)):
        return [number for number in value if number < layers]
    return value
