"""Map a model's tensors to the checkpoint's, through the renaming and fusing that the library did while loading.

transformers 5 loads ``experts.0.w1.weight`` … into one parameter ``experts.gate_up_proj``, and older names into newer
ones; the model keeps the conversions that were used (core_model_loading.py, ``_weight_conversions``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pytest_llmload.worker.checkpoints.files import CheckpointFiles

#: Conversions whose result can be taken apart: parts are stacked along dimension 0, then joined along dimension 1.
_STACK, _JOIN = "MergeModulelist", "Concatenate"


@dataclass(frozen=True)
class Fused:
    """A fused parameter: ``parameter[i]`` is the i-th tensor of each part, joined row by row."""

    parts: tuple[tuple[str, ...], ...]


class CheckpointNames:
    """The names of a model's tensors in its checkpoint."""

    def __init__(self, model: Any, files: CheckpointFiles, conversions: list[Any] | None = None) -> None:
        """Follow ``conversions``, the library's renaming and fusing, or by default those that the model keeps."""
        self.files = files
        self.prefix = getattr(model, "base_model_prefix", "")
        self._renamed: dict[str, str] = {}
        self._fused: dict[str, Fused] = {}
        #: A model's tensor -> all checkpoint tensors that it was made from, also if it cannot be taken apart.
        self._sources: dict[str, tuple[str, ...]] = {}
        #: A checkpoint's tensor -> the library's name of it.
        self._targets: dict[str, str] = {}
        #: The checkpoint's tensors that a conversion split; only the library knows into which tensors.
        self.divided: set[str] = set()
        if conversions is None:
            conversions = getattr(model, "_weight_conversions", None) or []
        self._follow(conversions)
        self._rename(getattr(model, "_checkpoint_conversion_mapping", None) or {})

    def find(self, path: str) -> str | None:
        """Return the checkpoint's name of a model's tensor; None if the checkpoint does not contain it as such."""
        return self._renamed.get(path) or self.files.find(path, self.prefix)

    def fused(self, path: str) -> Fused | None:
        """Return the checkpoint's tensors that a fused parameter was made from; None if they are not known."""
        return self._fused.get(path)

    def sources(self, path: str) -> tuple[str, ...]:
        """Return the checkpoint's tensors that a model's tensor was made from; none if they are not known."""
        name = self.find(path)
        return (name,) if name is not None else self._sources.get(path, ())

    def target(self, name: str) -> str:
        """Return the name that the library uses for a checkpoint's tensor in its loading info."""
        return self._targets.get(name, name)

    def _follow(self, conversions: list[Any]) -> None:
        """Apply the conversions to every name in the checkpoint, as the load did: renamings, then one converter."""
        converters = [conversion for conversion in conversions if hasattr(conversion, "operations")]
        renamings = [conversion for conversion in conversions if conversion not in converters]
        parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        used: dict[str, Any] = {}
        for name in sorted(self.files.where, key=_natural):
            target = name
            for renaming in renamings:
                target, _ = renaming.rename_source_key(target)
            pattern = None
            for converter in converters:
                target, pattern = converter.rename_source_key(target)
                if pattern is not None:
                    parts[target][pattern].append(name)
                    used[target] = converter
                    if len(converter.target_patterns) > 1:
                        self.divided.add(name)
                    break
            self._targets[name] = target
            if pattern is None and target != name:
                self._note(self._renamed, target, name)
        for target, by_pattern in parts.items():
            self._note(self._sources, target, tuple(name for names in by_pattern.values() for name in names))
            operations = used[target].operations
            kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in operations]
            if kinds in ([(_STACK, 0)], [(_STACK, 0), (_JOIN, 1)]):
                ordered = [
                    tuple(by_pattern[pattern]) for pattern in used[target].source_patterns if pattern in by_pattern
                ]
                self._note(self._fused, target, Fused(tuple(ordered)))

    def _rename(self, patterns: dict[str, str]) -> None:
        """Rename as transformers 4: the first matching pattern replaces its part (``_get_key_renaming_mapping``)."""
        for name in self.files.where if patterns else ():
            for pattern, replacement in patterns.items():
                target, fits = re.subn(pattern, replacement, name)
                if fits:
                    self._note(self._renamed, target, name)
                    break

    def _note(self, table: dict[str, Any], target: str, value: Any) -> None:
        """Store a value under the name with and without the base model's prefix, which a load adds or removes."""
        table[target] = value
        if self.prefix:
            table.setdefault(f"{self.prefix}.{target}", value)
            table.setdefault(target.removeprefix(f"{self.prefix}."), value)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which numbers in a path sort as numbers, so that expert 10 follows expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
