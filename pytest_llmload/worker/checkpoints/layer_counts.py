"""Cut the config of a model to some of its layers: every count of layers, and every list that has an entry a layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.units import counted
from pytest_llmload.worker.checkpoints.layer_kinds import Kept

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
#: Numbers of layers at the beginning that differ from the others.
_FIRST = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers)$")


def cut_config(
    config: dict[str, Any], directory: Path, kept: Kept, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return a config.json with only the layers ``kept`` of the decoder, and of the encoder where there are both.

    Towers for pictures and sounds stay whole. ``directory`` holds the config and the code that it brings.
    """
    found = copy.deepcopy(config)
    for part in _parts(found, _read(directory, trust_remote_code)):
        _cut(*part, kept)
    return found


def counts_to_cut(config: dict[str, Any], directory: Path, layers: int, *, trust_remote_code: bool = False) -> set[int]:
    """Return the numbers of layers of the stacks that a cut to ``layers`` of each kind may shorten.

    Raises MachineError, in one sentence, where the config does not say how many layers there are.
    """
    parts = _parts({}, _read(directory, trust_remote_code))
    counts = {count for _, part in parts for count in _counts(part).values()}
    if not counts:
        raise MachineError(f"{_name(config)} says nowhere how many layers it has, so it cannot be cut to {layers}")
    return counts


def nothing_left_out(config: dict[str, Any], kept: Kept, layers: int, kinds: int) -> MachineError:
    """Return the error of a cut that keeps every layer; its longest stack has so many ``kinds`` of layers."""
    each = f" of each of its {kinds} kinds" if kinds > 1 else ""
    return MachineError(
        f"{_name(config)} has {counted(max(kept), 'layer')}, and a cut to {layers}{each} leaves none of them out: "
        "load fewer layers, or the whole model"
    )


def layer_count(directory: Path, *, trust_remote_code: bool = False) -> int:
    """Return how many layers the longest stack of a model has that :func:`cut_config` would cut; 0 if it has none."""
    config = _read(directory, trust_remote_code)
    counts = [count for part in _parts({}, config) for count in _counts(part[1]).values()]
    return max(counts, default=0)


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


def _cut(data: dict[str, Any], config: Any, kept: Kept) -> None:
    """Cut one part of a config.json in place."""
    counts = _counts(config)
    mapped = next(iter(counts), "")
    longest = max(counts.values(), default=0)
    numbers = kept.get(longest, ())
    for name, value in _fields(data, config, numbers):
        data[name] = _cut_value(name, value, kept, longest)
    for name, count in counts.items():
        if len(kept[count]) < count and (name in data or name == mapped):
            data[name] = len(kept[count])


def _fields(data: dict[str, Any], config: Any, numbers: tuple[int, ...]) -> list[tuple[str, Any]]:
    """Return the fields that may be about layers: those written down, and where layers get other numbers, what the
    class derives too, since it would derive something else for them.
    """
    found = dict(data)
    if _are_renumbered(numbers):
        for name, value in vars(config).items():
            is_plain = isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value)
            if name not in data and not name.startswith("_") and (is_plain or _FIRST.search(name)):
                found[name] = value
    return list(found.items())


def _are_renumbered(numbers: tuple[int, ...]) -> bool:
    """Return whether layers in between are left out, so that those behind them get other numbers."""
    return numbers != tuple(range(len(numbers)))


def _cut_value(name: str, value: Any, kept: Kept, longest: int) -> Any:
    """Return a field without the layers that are left out: one with an entry a layer, one of layers' numbers, or the
    number of layers at the beginning that differ.
    """
    numbers = kept.get(longest, ())
    if _FIRST.search(name) and isinstance(value, int) and _are_renumbered(numbers):
        return sum(number < value for number in numbers)
    if _TEXTS.search(name) and isinstance(value, str) and len(value) in kept:
        return "".join(value[number] for number in kept[len(value)])
    if not isinstance(value, list) or not value or _OTHER_LISTS.search(name):
        return value
    if len(value) in kept:
        return [value[number] for number in kept[len(value)]]
    if all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list) for pair in value):
        # GPT-Neo's attention_types: patterns, each with how often it is repeated.
        spelled = [kind for kinds, times in value for _ in range(int(times)) for kind in kinds]
        return [[[spelled[number] for number in kept[len(spelled)]], 1]] if len(spelled) in kept else value
    is_numbers = all(isinstance(number, int) and 0 <= number < longest for number in value)
    if _NUMBERS.search(name) and is_numbers and value == sorted(set(value)):
        return [numbers.index(number) for number in value if number in numbers]
    return value
