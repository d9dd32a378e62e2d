"""The layers that a cut keeps, and the numbers that they have in it: for names of tensors, of modules and of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.units import counted
from pytest_llmload.worker.checkpoints.layer_kinds import Kept

#: Module path of a stack -> the numbers of the layers that stay.
Stacks = dict[str, tuple[int, ...]]


class KeptLayers:
    """Which layers of which stacks stay."""

    def __init__(self, stacks: Mapping[str, Iterable[int]], names: Iterable[str] = ()) -> None:
        """``names`` are the model's own names of tensors: those are placed by the exact path of their stack."""
        self.stacks: Stacks = {path: tuple(numbers) for path, numbers in stacks.items()}
        self._names = frozenset(names)
        self._new = {path: {old: new for new, old in enumerate(numbers)} for path, numbers in self.stacks.items()}

    def placed(self, name: str) -> str | None:
        """Return the name that a tensor or module has in the cut; None if it belongs to a layer that is left out.

        Files may have been saved with or without the model's own prefix, and hold tensors that its class does not know.
        """
        parts = name.split(".")
        for position, part in enumerate(parts[1:], 1):
            if not part.isdigit():
                continue
            new = self._numbers(".".join(parts[:position]), exactly=name in self._names)
            if new is not None:
                number = new.get(int(part))
                return None if number is None else ".".join((*parts[:position], str(number), *parts[position + 1 :]))
        return name

    def _numbers(self, stack: str, *, exactly: bool) -> dict[int, int] | None:
        """Return the new numbers of a stack that is cut; None for any other."""
        if exactly:
            return self._new.get(stack)
        ends = (known for known in self._new if f".{stack}".endswith(f".{known}") or f".{known}".endswith(f".{stack}"))
        return next((self._new[known] for known in ends), None)

    def in_names(self, value: Any) -> Any:
        """Return a value of a config, with every module that it names as the cut calls it, and without the others."""
        if isinstance(value, str):
            return self.placed(value)
        if isinstance(value, list):
            return [self.in_names(item) for item in value if not isinstance(item, str) or self.placed(item) is not None]
        if isinstance(value, dict):
            return {
                self.placed(key): self.in_names(item) for key, item in value.items() if self.placed(key) is not None
            }
        return value

    def in_numbers(self, numbers: Iterable[int]) -> list[int]:
        """Return layers' numbers as the cut counts them, of the longest stack."""
        longest = max(self._new.values(), key=len, default={})
        return [longest[number] for number in numbers if number in longest]


def kept_layers(
    whole: Mapping[str, tuple[int, ...]], cut: Mapping[str, tuple[int, ...]], kept: Kept, layers: int
) -> KeptLayers:
    """Return where the layers stand that a cut leaves out, by the tensors of the whole model and of the cut one.

    Raises MachineError, in one sentence, where the cut model is not a part of the whole one.
    """
    sizes = _sizes(whole), _sizes(cut)
    shorter = (path for path, count in sizes[0].items() if sizes[1].get(path, 0) < count)
    found = KeptLayers({path: kept[sizes[0][path]] for path in shorter if sizes[0][path] in kept}, whole)
    placed = {new: name for name in whole if (new := found.placed(name)) is not None}
    refused = f"the model cannot be cut to {counted(layers, 'layer')}"
    for name in sorted(cut):
        shape = whole.get(placed.get(name, ""))
        if cut[name] != shape:
            raise MachineError(
                f"{refused}: its tensor {name} is {list(cut[name])} in {counted(layers, 'layer')} and "
                f"{list(shape or ())} in all"
            )
    if lost := sorted(placed.keys() - cut.keys()):
        raise MachineError(f"{refused}: that would take away {placed[lost[0]]} too")
    return found


def _sizes(names: Iterable[str]) -> dict[str, int]:
    """Return how many entries each numbered module has, those within a numbered one apart."""
    found: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        position = next((at for at, part in enumerate(parts[1:], 1) if part.isdigit()), 0)
        if position:
            stack = ".".join(parts[:position])
            found[stack] = max(found.get(stack, 0), int(parts[position]) + 1)
    return found
