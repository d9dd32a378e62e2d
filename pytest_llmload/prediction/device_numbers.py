"""Bare numbers as devices: torch's CPU build has no accelerator that ``0`` could refer to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_REAL = torch.device
_PARSE = torch._C._nn._parse_to


def named(device: Any) -> Any:
    """Return the GPU with a number; return any other value unchanged."""
    return _REAL("cuda", device) if isinstance(device, int) and not isinstance(device, bool) else device


class _DeviceType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _REAL)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            return _REAL(named(args[0]))
        return _REAL(*args, **kwargs)


class NumberedDevice(metaclass=_DeviceType):
    """Stands in for ``torch.device``: makes real devices, also from a number."""


def parse_to(*args: Any, **kwargs: Any) -> Any:
    """Parse the arguments of ``Module.to``; stands in for ``torch._C._nn._parse_to``."""
    kwargs = {name: named(value) if name == "device" else value for name, value in kwargs.items()}
    return _PARSE(*([named(args[0]), *args[1:]] if args else ()), **kwargs)


def constructors() -> dict[str, Any]:
    """Return replacements, by name, for the functions of ``torch`` that make tensors on a device."""
    named_ones = {getattr(function, "__name__", ""): function for function in _device_constructors()}
    found = [name for name, one in named_ones.items() if getattr(torch, name, None) is one]
    found += [f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")]
    return {name: _taking_numbers(getattr(torch, name)) for name in found}


def methods() -> dict[str, Any]:
    """Return replacements, by name, for the tensor methods that make tensors on a device."""
    names = [f"new_{name}" for name in ("empty", "zeros", "ones", "full", "tensor", "empty_strided")]
    return {name: _taking_numbers(getattr(torch._C.TensorBase, name)) for name in names}


def _taking_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    def construct(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = named(kwargs["device"])
        return function(*args, **kwargs)

    return construct
