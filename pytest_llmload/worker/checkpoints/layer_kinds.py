"""Which kinds of layers a model has, and which of them a cut keeps: the first few of each kind.

A kind is what the config and the class say: the layer's declared type (sliding or full attention, linear attention),
its class and the classes of its direct parts (attention or state space, dense or mixture of experts).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llmload.worker.checkpoints.architecture import meta_model, tensors_of

#: Number of layers of a stack -> the numbers of the layers that a cut keeps, in their order.
Kept = dict[int, tuple[int, ...]]
#: Properties of transformers' configs that name the type of each layer, beside the lists that a config holds.
_TYPES = ("layer_types", "layers_block_type")


@dataclass(frozen=True)
class Outline:
    """A model on the meta device: its tensors as files name them, and the kind of each layer of its stacks."""

    tensors: dict[str, tuple[int, ...]]
    #: Module path of a stack, or field of a config -> the kind of each layer.
    stacks: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, directory: Path, *, trust_remote_code: bool = False) -> Outline:
        """Return the outline of the model that a config.json describes. Raises ValueError, with one sentence."""
        model = meta_model(directory, trust_remote_code=trust_remote_code)
        tensors = {tensor.name: tensor.shape for tensor in tensors_of(model, "F32")}
        return cls(tensors, {**_declared(model.config), **_built(model)})

    def kinds(self, count: int) -> list[tuple[str, ...]]:
        """Return the kind of each layer of a stack of ``count`` layers."""
        named = [kinds for kinds in self.stacks.values() if len(kinds) == count]
        return list(zip(*named, strict=True)) if named else [()] * count

    def is_cut_to(self, cut: Outline, kept: Kept) -> bool:
        """Return whether ``cut`` has these layers of this model, each of its kind, and every other stack whole."""
        for path, kinds in self.stacks.items():
            part = tuple(kinds[number] for number in kept.get(len(kinds), range(len(kinds))))
            if cut.stacks.get(path) not in (part, kinds):
                return False
        return True


def first_of_each(outline: Outline, counts: Iterable[int], layers: int) -> Kept:
    """Return the first ``layers`` layers of each kind, of the stacks that have ``counts`` layers."""
    kept: Kept = {}
    for count in counts:
        seen: Counter[tuple[str, ...]] = Counter()
        numbers = []
        for number, kind in enumerate(outline.kinds(count)):
            seen[kind] += 1
            if seen[kind] <= layers:
                numbers.append(number)
        kept[count] = tuple(numbers)
    return kept


def beginning(kept: Kept) -> Kept:
    """Return the shortest beginnings that hold the layers ``kept``."""
    return {count: tuple(range(max(numbers, default=-1) + 1)) for count, numbers in kept.items()}


def leaves_out(kept: Mapping[int, Sequence[int]]) -> bool:
    """Return whether any layer is left out."""
    return any(len(numbers) < count for count, numbers in kept.items())


def _declared(config: Any) -> dict[str, tuple[str, ...]]:
    """Return the fields of a config and its parts that have a text for each layer."""
    found = {}
    parts = {"": config, **{name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}}}
    for part, fields in parts.items():
        for name in dict.fromkeys((*getattr(fields, "__dict__", {}), *_TYPES)):
            value = getattr(fields, name, None)
            if isinstance(value, list) and len(value) > 1 and all(isinstance(entry, str) for entry in value):
                found[f"config {part}.{name}"] = tuple(value)
    return found


def _built(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the stacks of layers of a model, those within a layer apart."""
    import torch

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(part.isdigit() for part in path.split(".")):
            found[path] = tuple(map(_kind, module))
    return found


def _kind(layer: Any) -> str:
    parts = (f"{name}={type(module).__name__}" for name, module in layer.named_children())
    return f"{type(layer).__name__}({', '.join(parts)})"
