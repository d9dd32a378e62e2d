"""Which of a model's weights a quantiser should have quantised."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pytest_llmload.quantisation import Stored
from pytest_llmload.worker.model.tensors import BUFFER, PARAMETER, Held, Inventory

LINEAR, CONV1D, EXPERTS = "linear", "Conv1D", "experts"

_ROUTER_NAMES = {"gate", "router", "wg"}
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Weight:
    """A weight that a matrix product consumes, and that is neither embedding, output head nor router."""

    held: Held
    #: Path of the module as the model's code knows it: parametrizations and adapters are looked through.
    module_path: str
    module: Any
    kind: str
    quantised: Stored | None
    parametrized: bool = False

    @property
    def name(self) -> str:
        """Return the weight's name as the model's code knows it."""
        leaf = self.held.module.rsplit(".", 1)[-1] if self.parametrized else self.held.name
        return f"{self.module_path}.{leaf}" if self.module_path else leaf

    @property
    def nbytes(self) -> int:
        """Return the bytes that the weight takes in the model."""
        return self.held.nbytes

    @property
    def elements(self) -> int:
        """Return the number of elements of the dense weight, also if it is stored quantised."""
        if self.quantised is not None:
            return self.quantised.elements
        return math.prod(self.held.shape)


def quantisable(model: Any, inventory: Inventory) -> Iterator[Weight]:
    """Yield every weight of a Linear, a Conv1D or fused experts, minus embeddings, output head and routers.

    Not those of torch's own attention either (:func:`out_of_reach`).

    Embeddings and heads are those that a (sub)model itself names, what is tied to them, and what a model with a head
    has beside its base model (``score``, ``cls.predictions``). The last weight of a model, which transformers leaves
    dense since it takes it for the head, is left out if it is dense.
    """
    left_out = _embeddings(inventory) | _head(model)
    last = _last(inventory)
    seen: set[int] = set()
    for held, state, tensor in weights_of(inventory):
        path = held.module
        parametrized = ".parametrizations." in f".{path}"
        if parametrized:
            path = path.rsplit("parametrizations.", 1)[0].removesuffix(".")
        owner = inventory.modules[path]
        path = inventory.wrapping.base_module(path) or ""
        kind = _kind(owner, path, held, state)
        if kind is None or id(tensor) in seen or id(tensor) in left_out or _is_router(model, owner, path, held):
            continue
        if state is None and (id(tensor) == last or _is_torchs_attention(owner)):
            continue
        seen.add(id(tensor))
        yield Weight(held, path, owner, kind, state, parametrized)


def exempt(model: Any, inventory: Inventory) -> set[int]:
    """Return the ids of what need not be quantised: :func:`dense_by_default`, and all that stands beside the base."""
    return dense_by_default(model, inventory) | _head(model) | {_last(inventory)}


def dense_by_default(model: Any, inventory: Inventory) -> set[int]:
    """Return the ids of what stays dense by its place: embeddings, output head, routers, and torch's own attention."""
    named: dict[str, list[Held]] = defaultdict(list)
    for held in inventory.held:
        named[held.path].append(held)
    routers = {
        id(parameter)
        for path, module in inventory.modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
        and (
            _is_torchs_attention(module)
            or any(_is_router(model, module, path, held) for held in named[f"{path}.{name}"])
        )
    }
    return routers | _embeddings(inventory)


def weights_of(inventory: Inventory) -> Iterator[tuple[Held, Stored | None, Any]]:
    """Yield each parameter of the model, and each quantised weight as one, whichever tensors hold it.

    With it the quantised weight, None for a dense parameter, and the tensor that the module itself has.
    """
    owned: dict[str, list[Held]] = defaultdict(list)
    for held in inventory.held:
        if held.role in (PARAMETER, BUFFER) and not inventory.is_adapter(held):
            owned[held.module].append(held)
    for path, tensors in owned.items():
        module = inventory.modules[path]
        holders = {holder: weight for weight in inventory.stored_weights(path) for holder in weight.holders}
        parts: dict[str, list[Held]] = defaultdict(list)
        for held in tensors:
            # A tensor inside a subclass is called ``weight.qdata``.
            name = held.name.partition(".")[0]
            if name in holders:
                parts[holders[name].holders[0]].append(held)
            elif held.role == PARAMETER:
                parts[name].append(held)
        for name, found in parts.items():
            weight = holders.get(name)
            tensor = module._parameters.get(name)
            yield _joined(name, weight, found), weight, module._buffers.get(name) if tensor is None else tensor


def _joined(name: str, weight: Stored | None, parts: list[Held]) -> Held:
    """Return the tensors of one weight as one, by the first of them that holds its values."""
    first = next((held for held in parts if held.name.partition(".")[0] == name), parts[0])
    return dataclasses.replace(
        first,
        name=weight.name if weight is not None else name,
        nbytes=sum(held.nbytes for held in parts),
        whole_bytes=sum(held.whole_bytes for held in parts),
    )


def out_of_reach(inventory: Inventory) -> list[Held]:
    """Return dense matrices of torch's own attention.

    It hands them to a function: no quantiser can take their place.
    """
    return [
        held
        for held in inventory.parameters()
        if len(held.shape) == 2
        and _is_torchs_attention(inventory.modules[held.module])
        and inventory.stored(held) is None
    ]


def _is_torchs_attention(owner: Any) -> bool:
    """Return whether a module is a part of torch's own attention.

    It is ``MultiheadAttention`` with its ``in_proj_weight``, or its ``out_proj``, whose class says so much.
    """
    return isinstance(owner, (torch.nn.MultiheadAttention, torch.nn.modules.linear.NonDynamicallyQuantizableLinear))


def _kind(owner: Any, path: str, held: Held, state: Stored | None) -> str | None:
    name = type(owner).__name__
    if held.name.endswith("bias") or isinstance(owner, torch.nn.Embedding):
        return None
    fused = len(held.shape) >= 3 or state is not None or (len(held.shape) == 2 and not _linear_like(owner))
    if fused and ("Experts" in name or "experts" in path.split(".")):
        # A list of expert modules has its Linears below; what such a path owns itself is the fused weight.
        return EXPERTS
    if name == "Conv1D" or getattr(getattr(owner, "source_cls", None), "__name__", "") == "Conv1D":
        return CONV1D if len(held.shape) == 2 or state is not None else None
    if state is not None or (len(held.shape) == 2 and held.name == "weight" and _linear_like(owner)):
        return LINEAR
    return None


def _linear_like(owner: Any) -> bool:
    """Return whether a module is a Linear, a subclass of it, or another library's class with a Linear's geometry."""
    return isinstance(owner, torch.nn.Linear) or (hasattr(owner, "in_features") and hasattr(owner, "out_features"))


def output_heads(inventory: Inventory) -> set[str]:
    """Return the paths of the modules that models and submodels name as their output heads."""
    heads = {id(part) for part in _named(inventory, "get_output_embeddings")}
    return {path for path, module in inventory.modules.items() if id(module) in heads}


def _embeddings(inventory: Inventory) -> set[int]:
    """Return ids of the parameters that are embeddings or output heads."""
    found: set[int] = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        for part in _named(inventory, getter):
            found |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    for module in inventory.modules.values():
        if isinstance(module, torch.nn.Embedding):
            found |= {id(param) for param in module.parameters()}
    return found


def _named(inventory: Inventory, getter: str) -> Iterator[Any]:
    """Yield what models and submodels return as their embeddings or their output head."""
    for module in inventory.modules.values():
        if hasattr(module, getter):
            try:
                part = getattr(module, getter)()
            except (NotImplementedError, AttributeError):
                # A submodel that has no such part says so by raising.
                continue
            # Perceiver names the parameter of its latents.
            if isinstance(part, torch.nn.Module):
                yield part


def _last(inventory: Inventory) -> int:
    """Return the id of the model's last parameter; 0 if it has none."""
    last = next(reversed(list(inventory.parameters())), None)
    return id(inventory.modules[last.module]._parameters.get(last.name)) if last is not None else 0


def _head(model: Any) -> set[int]:
    """Return ids of the parameters beside the base model, where there is one."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    if not isinstance(base, torch.nn.Module):
        return set()
    return {id(param) for param in model.parameters()} - {id(param) for param in base.parameters()}


def _is_router(model: Any, owner: Any, path: str, held: Held) -> bool:
    if "Router" in type(owner).__name__ or "TopKGate" in type(owner).__name__:
        return True
    if path.rsplit(".", 1)[-1] not in _ROUTER_NAMES:
        return False
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    counts = {getattr(config, name, None) for name in _EXPERT_COUNTS}
    return getattr(owner, "out_features", held.shape[0]) in counts
