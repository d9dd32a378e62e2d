"""The methods of tensors and storages whose results depend on the device, or on bytes that do not exist."""

from __future__ import annotations

from typing import Any

import torch

from pytest_llmload.prediction.dispatch import FakeDevice
from pytest_llmload.prediction.fake_tensors import CPU, Registry

_BASE = torch._C.TensorBase
_STORAGE = torch._C.StorageBase


def tensor_methods(mode: FakeDevice) -> dict[str, Any]:
    """Return the replacements for attributes of ``torch.Tensor``, by name."""
    registry = mode.registry

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        copy = bool(kwargs.pop("copy", False))
        if args and isinstance(args[0], torch.Tensor):
            other, rest = args[0], args[1:]
            args = (registry.device_of(other), other.dtype, *rest)
        if len(args) == 4 and isinstance(args[-1], bool):
            copy, args = args[-1], args[:-1]
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        target = mode.named(device) if device is not None else registry.device_of(self)
        wanted = dtype if dtype is not None else self.dtype
        same = target == registry.device_of(self) and wanted == self.dtype
        if same and not copy and (layout is None or self.is_contiguous(memory_format=layout)):
            return self
        if target.type == "meta":
            return torch.empty_strided(self.size(), self.stride(), dtype=wanted, device=target)
        if target.type != "cuda" and registry.find(self) is None:
            return _BASE.to(self, target, wanted, non_blocking, copy, memory_format=layout)
        return torch.ops.aten._to_copy.default(
            self, dtype=wanted, device=target, non_blocking=non_blocking, memory_format=layout
        )

    def cuda(self: Any, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Any:
        index = mode.current_device() if device is None else device
        target = torch.device("cuda", index) if isinstance(index, int) else index
        return to(self, target, non_blocking=non_blocking, memory_format=memory_format)

    def softmax(self: Any, dim: int, dtype: Any = None) -> Any:
        # ATen/native/SoftMax.cpp: GPU kernels read half precision and write float without an intermediate copy.
        if registry.device_of(self).type == "cuda" and (self.dtype, dtype) == (torch.float16, torch.float32):
            return torch.ops.aten._softmax.default(self, dim, True)
        return _BASE.softmax(self, dim, dtype=dtype)

    def data_ptr(self: Any) -> int:
        storage = registry.find(self)
        if storage is None:
            return int(_BASE.data_ptr(self))
        # Tensors of the host have no such address: the address of the storage object distinguishes them.
        start = storage.address or self.untyped_storage()._cdata
        return int(start + self.storage_offset() * self.element_size())

    def values(self: Any, name: str) -> Any:
        known = registry.values_of(self) if registry.find(self) is not None else self
        if known is None:
            raise mode.refuse(
                f"Tensor.{name} reads values that are computed from weights, which a prediction never reads"
            )
        return known

    return {
        "device": property(registry.device_of),
        "is_cuda": property(lambda self: registry.device_of(self).type == "cuda"),
        "is_cpu": property(lambda self: registry.device_of(self).type == "cpu"),
        "is_meta": property(lambda self: registry.device_of(self).type == "meta"),
        "get_device": lambda self: -1 if registry.device_of(self).index is None else registry.device_of(self).index,
        "to": to,
        "cuda": cuda,
        "cpu": lambda self, memory_format=None: to(self, CPU, memory_format=memory_format),
        "type_as": lambda self, other: to(self, other),
        "softmax": softmax,
        "data_ptr": data_ptr,
        "tolist": lambda self: _BASE.tolist(values(self, "tolist")),
        "numpy": lambda self, *, force=False: _BASE.numpy(values(self, "numpy"), force=force),
    }


def storage_methods(registry: Registry) -> dict[str, Any]:
    """Return the replacements for attributes of ``torch.UntypedStorage``, by name."""

    def device(self: Any) -> torch.device:
        storage = registry.of_untyped(self)
        return storage.device if storage is not None else _STORAGE.device.__get__(self)

    def data_ptr(self: Any) -> int:
        storage = registry.of_untyped(self)
        return int(_STORAGE.data_ptr(self) if storage is None else storage.address or self._cdata)

    return {
        "device": property(device),
        "is_cuda": property(lambda self: device(self).type == "cuda"),
        "data_ptr": data_ptr,
    }
