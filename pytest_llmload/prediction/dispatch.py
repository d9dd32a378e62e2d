"""Run every operator of torch on fake tensors: shapes come from meta kernels, devices from the operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_llmload.prediction.fake_tensors import CPU, KNOWN_BYTES, META, Registry, Untraceable

aten = torch.ops.aten

#: A function that computes an operator's result in place of its meta kernel, from the mode, the operator's overload,
#: its arguments and its keywords.
Handler = Callable[["FakeDevice", Any, tuple[Any, ...], dict[str, Any]], Any]

#: Operators whose result, or its shape, depends on values.
_NEEDS_VALUES = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
#: Operators that accept indices or scalars on a different device from their first operand's.
_MIXES_DEVICES = ("index", "copy_", "_to_copy", "_copy_from", "set_", "record_stream")


class FakeDevice(TorchDispatchMode):  # type: ignore[misc]
    """While it is entered, tensors of ``device`` are fake ones.

    Args:
        registry: The registry of their storages.
        handlers: Handlers of the operators that need more than their meta kernel, by overload.
        current_device: The index of the GPU that ``cuda`` without a number refers to.
        before: Called with each operator before it runs.
        refuse: Makes the error to raise for an operator that cannot be traced.
    """

    def __init__(
        self,
        registry: Registry,
        handlers: dict[Any, Handler],
        current_device: Callable[[], int],
        before: Callable[[Any], None],
        refuse: Callable[[str], Untraceable],
    ) -> None:
        super().__init__()
        self.registry = registry
        self.handlers = handlers
        self.current_device = current_device
        self.before = before
        self.refuse = refuse
        #: Names of the library operators whose own kernels are running, innermost last.
        self.inside: list[str] = []
        #: Operator and its operands' layouts -> true if it returns one tensor; each result's size, strides and dtype.
        self._layouts: dict[Any, tuple[bool, list[Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.before(func)
        handler = self.handlers.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator: on meta tensors if a fake tensor takes part in it, else unchanged."""
        tensors = list(_tensors(args, kwargs))
        target = self.target(func, tensors, kwargs)
        if target is None:
            return func(*args, **kwargs)
        if func in _NEEDS_VALUES or _by_mask(func, args):
            return self._by_values(func, args, kwargs, target)
        if _is_composite(func):
            # Reached if autograd is off: the operators that it consists of allocate.
            with self:
                return func.decompose(*args, **kwargs)
        if _has_own_kernel(func):
            # A library's Python code for this device: its allocations are recorded as it runs.
            self.inside.append(str(func.overloadpacket))
            try:
                with self:
                    return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
            finally:
                self.inside.pop()
        out = self._shaped(func, args, kwargs, tensors)
        for leaf in _tensors((out,), {}):
            if self.registry.find(leaf) is None:
                self.registry.add(leaf, target)
        self._values(func, args, kwargs, tensors, out)
        return out

    def target(self, func: Any, tensors: list[Any], kwargs: dict[str, Any]) -> torch.device | None:
        """Return the device of an operator's new tensors; None if it neither reads nor makes a fake tensor."""
        asked = kwargs.get("device")
        if asked is not None:
            device = self.named(asked)
            if device.type == "cuda":
                return device
            if all(self.registry.find(tensor) is None for tensor in tensors):
                return None
            if device.type == "meta" and func is aten._to_copy.default:
                # Comes from C++ code that takes its operand's device: a user's move to meta is not dispatched.
                return self.registry.device_of(tensors[0])
            return device
        fake = [tensor for tensor in tensors if self.registry.find(tensor) is not None]
        if not fake:
            return None
        devices = [self.registry.device_of(tensor) for tensor in tensors if tensor.dim()]
        if not devices:
            devices = [self.registry.device_of(tensor) for tensor in fake]
        if len(set(devices)) > 1 and not func._schema.name.partition("::")[2].startswith(_MIXES_DEVICES):
            named = ", ".join(sorted({str(device) for device in devices}))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {named}")
        return devices[0]

    def named(self, device: Any) -> torch.device:
        """Return a device with its index."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", self.current_device())
        return device

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Any]) -> Any:
        """Return an operator's meta result; the layout of an equal earlier call is reused."""
        key = (func, _described(args), _described(tuple(sorted(kwargs.items()))))
        try:
            layouts = self._layouts.get(key)
        except TypeError:
            return self._on_meta(func, args, kwargs)
        if layouts is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in layouts[1]]
            return made[0] if layouts[0] else tuple(made)
        out = self._on_meta(func, args, kwargs)
        leaves = [out] if isinstance(out, torch.Tensor) else out
        if (
            not _written(func)
            and isinstance(leaves, (list, tuple))
            and all(self._owned(leaf, tensors) for leaf in leaves)
        ):
            rows = [(tuple(leaf.size()), leaf.stride(), leaf.dtype) for leaf in leaves]
            self._layouts[key] = isinstance(out, torch.Tensor), rows
        return out

    def _owned(self, leaf: Any, tensors: list[Any]) -> bool:
        """Return true if a result is a tensor that owns its storage, and the storage is not larger than the tensor."""
        if not isinstance(leaf, torch.Tensor) or leaf.storage_offset():
            return False
        tight = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device=META)
        return self._is_new(leaf, tensors) and self._storage_bytes(tight) == self._storage_bytes(leaf)

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": META}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        args, kwargs = _mapped(args, _as_meta), {name: _mapped(value, _as_meta) for name, value in kwargs.items()}
        self.registry.plain = True
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            decomposed = func.decompose(*args, **kwargs)
            if decomposed is NotImplemented:
                raise self.refuse(f"operator {func} has no kernel that computes shapes: {error}") from error
            return decomposed
        finally:
            self.registry.plain = False

    def _by_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device) -> Any:
        """Return the result of an operator that reads values. Raises Untraceable if the values are unknown."""
        try:
            known_args, known_kwargs = self._known(args, kwargs)
        except _Unknown:
            raise self.refuse(
                f"operator {func} reads values that are computed from weights, which a prediction never reads"
            ) from None
        out = func(*known_args, **known_kwargs)
        return _mapped(out, lambda value: self.from_values(value, target))

    def from_values(self, values: Any, target: torch.device) -> Any:
        """Return a new fake tensor of a device with the values of a host tensor."""
        fake = torch.empty_strided(values.size(), values.stride(), dtype=values.dtype, device=META)
        self.registry.add(fake, target)
        self.registry.learn(fake, values)
        return fake

    def _values(self, func: Any, args: Any, kwargs: Any, tensors: list[Any], out: Any) -> None:
        """Compute an operator's values if those of all its operands are known; else forget those that it overwrites."""
        written = _written(func)
        new = [leaf for leaf in _tensors((out,), {}) if self._is_new(leaf, tensors)]
        if not written and (not new or any(self._storage_bytes(leaf) > KNOWN_BYTES for leaf in new)):
            return
        if not tensors and func in (aten.empty.memory_format, aten.empty_strided.default):
            return
        try:
            known_args, known_kwargs = self._known(args, kwargs)
        except _Unknown:
            for place in written:
                value = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(place)
                for leaf in _tensors((value,), {}):
                    self._overwritten(func, leaf)
            return
        values = func(*known_args, **known_kwargs)
        for leaf, value in zip(_tensors((out,), {}), _tensors((values,), {}), strict=True):
            if any(leaf is one for one in new):
                self.registry.learn(leaf, value)

    def _overwritten(self, func: Any, tensor: Any) -> None:
        storage = self.registry.find(tensor)
        if storage is not None:
            storage.values = None
        elif tensor.device.type == "cpu":
            raise self.refuse(f"operator {func} writes values that are computed from weights to a tensor of the host")

    def _is_new(self, leaf: Any, tensors: list[Any]) -> bool:
        key = leaf.untyped_storage()._cdata
        return all(tensor.untyped_storage()._cdata != key for tensor in tensors)

    def _storage_bytes(self, tensor: Any) -> int:
        return int(tensor.untyped_storage().nbytes())

    def _known(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        def known(value: Any) -> Any:
            values = self.registry.values_of(value)
            if values is None:
                raise _Unknown
            return values

        on_host = {
            name: CPU if name == "device" and value is not None else _mapped(value, known)
            for name, value in kwargs.items()
        }
        return _mapped(args, known), on_host


class _Unknown(Exception):
    pass


def _tensors(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value, {})


def _described(value: Any) -> Any:
    """Return the properties of an operand that a meta kernel reads; not hashable if they cannot be determined."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype, value.is_contiguous()
    if isinstance(value, (list, tuple)):
        return tuple(_described(item) for item in value)
    # 1, 1.0 and True are equal and do not give equal types.
    return type(value), value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _as_meta(tensor: Any) -> Any:
    if torch._C.TensorBase.device.__get__(tensor).type == "meta":
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


def _by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Return true if an index is a mask, so that the number of its true elements gives the result's shape."""
    if func.overloadpacket is not aten.index or len(args) < 2:
        return False
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1], {}))


@cache
def _written(func: Any) -> tuple[Any, ...]:
    """Return the positions or names of the arguments that an operator writes to."""
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _is_composite(func: Any) -> bool:
    """Return true if an operator consists of other operators only."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def _has_own_kernel(func: Any) -> bool:
    """Return true if a library has registered a GPU kernel; torch's CPU build has none of its own."""
    keys = ("CUDA",) if func.namespace in ("aten", "prims") else ("CUDA", "CompositeExplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys)
