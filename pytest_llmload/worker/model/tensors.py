"""Every tensor that belongs to a model, wherever its library keeps it.

Walking ``model.parameters()`` is not enough: quantisation states are attributes of a parameter, of its module or of a
parametrization; offloaded weights live in accelerate's hooks or only on disk; tensor subclasses wrap others; meta
tensors claim bytes that are not allocated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from pytest_llmload.quantisation import Stored
from pytest_llmload.quantisation.stored import stored_weights
from pytest_llmload.worker.adapters.wrapping import Wrapping

PARAMETER, BUFFER, STATE = "parameter", "buffer", "state"
#: Dtypes of weights that nothing was done to, and of masks.
_DENSE = ("float64", "float32", "float16", "bfloat16", "bool")

#: Attributes that every module has, and those that lead out of the model (the map of ranks); what else it holds is its
#: own.
_MODULE_INTERNALS = frozenset(vars(torch.nn.Module())) | {
    "_hf_hook",
    "_old_forward",
    "forward",
    "_device_mesh",
    "_mesh_manager",
}
_LEAVES = (
    torch.nn.Module,
    torch.dtype,
    torch.device,
    type,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
)
#: Ids of the types of most attributes of a module, which are told faster by a look into a set. Not the types
#: themselves, whose hash and equality a metaclass may define.
_PLAIN = frozenset(map(id, (*_LEAVES, bool)))
_DEPTH = 6


@dataclass(frozen=True)
class Held:
    """One tensor of a model."""

    #: Path of the module that owns it.
    module: str
    #: Its name there: ``weight``, ``weight.quant_state.absmax``, ``state.SCB``.
    name: str
    #: parameter, buffer, or state (all else that a module or parameter holds).
    role: str
    #: ``cuda:0``, ``cpu``, ``disk``, ``meta``.
    device: str
    dtype: str
    shape: tuple[int, ...]
    #: Bytes by elements, of this process's part.
    nbytes: int
    #: Bytes by elements as if nothing were sharded.
    whole_bytes: int
    #: The tensor itself, of this process's part; None where it is on disk only.
    tensor: Any
    #: Whether a hook puts it in place for each forward.
    offloaded: bool = False
    #: Whether a buffer is part of the state dict.
    persistent: bool = True
    #: File and name, where it is on disk only.
    source: str = ""

    @property
    def path(self) -> str:
        """Return the tensor's name in the model: ``model.layers.0.mlp.up_proj.weight``."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def in_state_dict(self) -> bool:
        """Return whether it is, or is a part of, a parameter or persistent buffer, which a checkpoint may hold."""
        return self.role == PARAMETER or (self.role == BUFFER and self.persistent)

    @property
    def storage(self) -> tuple[str, int]:
        """Return what two tensors that share memory have in common."""
        return self.device, self.tensor.untyped_storage().data_ptr() if self.tensor is not None else -1


class Inventory:
    """All tensors of a model at one moment. It keeps them alive: drop it before the next forward."""

    def __init__(self, model: Any) -> None:
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.wrapping = Wrapping(self.modules)
        self._model = model
        self._stored: dict[str, list[Stored]] = {}
        offloaded = _offloaded(self.modules)
        barren: set[int] = set()
        self.held: list[Held] = [
            held for path, module in self.modules.items() for held in _of_module(path, module, offloaded, barren)
        ]

    def parameters(self) -> Iterator[Held]:
        """Yield the model's own parameters, without those of an adapter."""
        return (held for held in self.held if held.role == PARAMETER and not self.is_adapter(held))

    def is_adapter(self, held: Held) -> bool:
        """Return whether a tensor was brought by an adapter."""
        return self.wrapping.owner(held.module) is None

    def base_path(self, held: Held) -> str:
        """Return a tensor's name in the model without the adapter that may be around it: its name in the checkpoint."""
        module = self.wrapping.owner(held.module)
        return held.path if module is None else f"{module}.{held.name}" if module else held.name

    def base_paths(self, held: Held) -> tuple[str, ...]:
        """Return names as :func:`base_path`, at every place where the module that owns the tensor stands."""
        owners = self._places.get(id(self.modules[held.module]), ())
        return tuple(f"{owner}.{held.name}" if owner else held.name for owner in owners)

    @cached_property
    def _places(self) -> dict[int, list[str]]:
        """Return each module's paths in the model without the adapter; ``self.modules`` has the first of each."""
        modules = dict(self._model.named_modules(remove_duplicate=False))
        wrapping = self.wrapping if len(modules) == len(self.modules) else Wrapping(modules)
        places: dict[int, list[str]] = defaultdict(list)
        for path, module in modules.items():
            owner = wrapping.owner(path)
            if owner is not None:
                places[id(module)].append(owner)
        return places

    def stored(self, held: Held) -> Stored | None:
        """Return the quantised weight that a parameter or buffer belongs to.

        A tensor inside a subclass (``weight.qdata``) stands for the whole. None if the tensor is dense or its state is
        lost.
        """
        own = held.name.partition(".")[0]
        return next((weight for weight in self.stored_weights(held.module) if own in weight.holders), None)

    def stored_weights(self, path: str) -> list[Stored]:
        """Return the quantised weights that the module at a path holds itself."""
        if path not in self._stored:
            self._stored[path] = stored_weights(self.modules[path])
        return self._stored[path]

    def state(self) -> dict[str, Any]:
        """Return the model's state dict: its own tensors by every name.

        Those that a hook puts in place for a forward are in it too.
        """
        held = {each.path: each.tensor for each in self.held if each.role in (PARAMETER, BUFFER)}
        state: dict[str, Any] = self._model.state_dict(keep_vars=True)
        return state | {path: held[path] for path in state if held.get(path) is not None}

    def storages(self) -> dict[tuple[str, int], int]:
        """Return distinct live storages: (device, address) -> bytes. Meta and disk hold none."""
        found: dict[tuple[str, int], int] = {}
        for held in self.held:
            if held.tensor is None or held.device == "meta":
                continue
            storage = held.tensor.untyped_storage()
            if storage.nbytes():
                key = held.storage
                found[key] = max(found.get(key, 0), storage.nbytes())
        return found

    def distinct(self) -> Iterator[Held]:
        """Yield each tensor once, however many names it has: tied weights and aliases count once. Meta is left out."""
        seen = set()
        for held in self.held:
            if held.device == "meta":
                continue
            key: tuple[Any, ...] = (held.path,)
            if held.tensor is not None:
                key = (held.device, held.tensor.data_ptr(), held.nbytes)
            elif held.source:
                key = (held.device, held.source)
            if key not in seen:
                seen.add(key)
                yield held


def is_packed(tensors: Iterable[Held]) -> bool:
    """Return whether a module's own tensors hold a weight in a quantised form.

    That is a matrix of integers or of narrow floats.
    """
    return any(
        held.role in (PARAMETER, BUFFER) and len(held.shape) >= 2 and held.dtype not in _DENSE for held in tensors
    )


def local_part(tensor: Any) -> Any:
    """Return this process's part of a distributed tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def inner_tensors(tensor: Any) -> list[tuple[str, Any]]:
    """Return the tensors that a wrapper subclass consists of (``__tensor_flatten__`` of torch); empty for others."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [(name, getattr(tensor, name)) for name in names]


def leaves(tensor: Any) -> Iterator[Any]:
    """Yield the plain tensors that a tensor consists of: those inside wrapper subclasses, at any depth, or itself."""
    inner = inner_tensors(tensor)
    for _, part in inner:
        yield from leaves(part)
    if not inner:
        yield tensor


def _held(module: str, name: str, role: str, tensor: Any, **rest: Any) -> Iterator[Held]:
    part = local_part(tensor)
    inner = inner_tensors(part)
    for suffix, leaf in inner:
        yield from _held(module, f"{name}.{suffix}", role, leaf, **rest)
    if inner:
        return
    yield Held(
        module=module,
        name=name,
        role=role,
        device=str(part.device),
        dtype=str(part.dtype).removeprefix("torch."),
        shape=tuple(part.shape),
        nbytes=part.numel() * part.element_size(),
        whole_bytes=tensor.numel() * tensor.element_size(),
        tensor=part,
        **rest,
    )


def _of_module(path: str, module: Any, offloaded: Mapping[str, Any], barren: set[int]) -> Iterator[Held]:
    """Yield the tensors that a module itself holds.

    ``barren`` collects the ids of attributes that lead to no tensor: a model's config is an attribute of most modules.
    """
    named = [(name, tensor, PARAMETER) for name, tensor in module._parameters.items()]
    named += [(name, tensor, BUFFER) for name, tensor in module._buffers.items()]
    seen: set[int] = set()
    for name, tensor, role in named:
        if tensor is None:
            continue
        persistent = name not in module._non_persistent_buffers_set
        full = f"{path}.{name}" if path else name
        if tensor.device.type == "meta" and full in offloaded:
            yield from _located(path, name, role, offloaded[full], tensor, persistent)
        else:
            yield from _held(path, name, role, tensor, persistent=persistent)
        for suffix, state in _reachable(vars(tensor) if hasattr(tensor, "__dict__") else {}, _DEPTH, seen):
            yield from _held(path, f"{name}.{suffix}", STATE, state)
    for name, value in vars(module).items():
        if name in _MODULE_INTERNALS or id(type(value)) in _PLAIN or id(value) in barren:
            continue
        if next(_reachable(value, _DEPTH, set()), None) is None:
            barren.add(id(value))
            continue
        for suffix, state in _reachable(value, _DEPTH, seen):
            yield from _held(path, f"{name}.{suffix}" if suffix else name, STATE, state)


def _reachable(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield tensors that an attribute leads to, with the way there; modules and functions lead nowhere."""
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            yield "", value
        return
    if depth == 0 or isinstance(value, _LEAVES) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        items = list(vars(value).items()) if hasattr(value, "__dict__") else []
    for name, item in items:
        if id(type(item)) not in _PLAIN:
            for suffix, tensor in _reachable(item, depth - 1, seen):
                yield f"{name}.{suffix}" if suffix else name, tensor


def _offloaded(modules: Mapping[str, Any]) -> dict[str, Any]:
    """Return full name -> a tensor, or its place on disk, for what accelerate's hooks put in place for a forward.

    ``AlignDevicesHook(offload=True)`` replaces a module's tensors by meta ones and keeps the values in ``weights_map``
    (accelerate/hooks.py, ``init_hook``).
    """
    found: dict[str, Any] = {}
    for path, module in modules.items():
        for hook in _hooks(module):
            if not getattr(hook, "offload", False) or hook.weights_map is None:
                continue
            names = [name for name, _ in module.named_parameters(recurse=hook.place_submodules)]
            if hook.offload_buffers:
                names += [name for name, _ in module.named_buffers(recurse=hook.place_submodules)]
            for name in names:
                value = _peek(hook.weights_map, name)
                if value is not None:
                    found[f"{path}.{name}" if path else name] = value
    return found


def _hooks(module: Any) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def _peek(weights: Any, key: str) -> Any:
    """Return what a weights map holds under a key, without reading it from disk.

    Follows accelerate's PrefixedDataset (``dataset``, ``prefix``) and OffloadedWeightsLoader (``state_dict``,
    ``index``); any other mapping is asked for the value.
    """
    if hasattr(weights, "dataset") and hasattr(weights, "prefix"):
        return _peek(weights.dataset, f"{weights.prefix}{key}")
    if hasattr(weights, "state_dict") and hasattr(weights, "index"):
        return weights.state_dict.get(key, weights.index.get(key))
    return weights.get(key)


def _located(path: str, name: str, role: str, value: Any, meta: Any, persistent: bool) -> Iterator[Held]:
    if isinstance(value, torch.Tensor):
        yield from _held(path, name, role, value, offloaded=True, persistent=persistent)
        return
    dtype = str(value.get("dtype") or meta.dtype).removeprefix("torch.")
    size = meta.numel() * getattr(torch, dtype).itemsize
    source = f"{value.get('safetensors_file', '')}:{value['weight_name']}" if "weight_name" in value else ""
    yield Held(path, name, role, "disk", dtype, tuple(meta.shape), size, size, None, True, persistent, source)
