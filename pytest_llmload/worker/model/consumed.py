"""Which parameters a matrix product consumes, seen in a forward: by what is done with them, not by their names."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_llmload.worker.model.tensors import local_part

#: Operators of aten, by their names without overloads; a Linear and an einsum come apart into these.
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_grouped_mm", "_scaled_mm", "linear"})
#: Those whose first operand is added to the product.
_ADDING = frozenset({"addmm", "baddbmm", "addmv"})
#: Operators whose result stands for a parameter: copies in a different dtype or order. Views share its storage anyway.
_COPIES = frozenset({"_to_copy", "clone", "index", "index_select", "cat", "stack", "mul", "_unsafe_view", "contiguous"})


class Consumed(TorchDispatchMode):  # type: ignore[misc]
    """Notes the parameters whose values reach a matrix product, and those that any operator reads.

    Args:
        parameters: The tensors to look for, by their names.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        super().__init__()
        self.products: set[str] = set()
        self.touched: set[str] = set()
        self._names = {_place(tensor): name for name, tensor in parameters.items() if _has_values(tensor)}
        #: Copies of parameters, kept so that no address is given out again.
        self._copies: dict[tuple[str, int], tuple[str, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = {name: tensor for tensor in _tensors(args) if (name := self._name(tensor))}
        if found:
            self.touched |= found.keys()
            operator = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
            if operator in _PRODUCTS:
                factors = args[1:] if operator in _ADDING else args
                self.products |= {name for tensor in _tensors(factors) if (name := self._name(tensor))}
            elif operator in _COPIES and isinstance(result, torch.Tensor) and len(found) == 1:
                ((name, tensor),) = found.items()
                # An activation that a parameter scales is larger, and no copy of it.
                if operator != "mul" or result.numel() == tensor.numel():
                    self._copies.setdefault(_place(result), (name, result))
        return result

    def _name(self, tensor: Any) -> str:
        if not _has_values(tensor):
            return ""
        place = _place(tensor)
        return self._names.get(place) or self._copies.get(place, ("", None))[0]


def _place(tensor: Any) -> tuple[str, int]:
    part = local_part(tensor)
    return str(part.device), part.untyped_storage().data_ptr()


def _has_values(tensor: Any) -> bool:
    return bool(tensor.device.type != "meta" and tensor.layout == torch.strided and tensor.numel())


def _tensors(values: Any) -> list[Any]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
