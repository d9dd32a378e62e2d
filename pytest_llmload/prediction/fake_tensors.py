"""Tensors of a GPU that does not exist: plain meta tensors whose storages are in a registry with a device.

Model code sees ordinary tensors whose device is ``cuda:0``. They are not of a subclass, so that every library can make
parameters of them. A small tensor that is computed from known values only (token ids, masks, positions) also has its
values, in a storage on the host, so that code that reads them runs as it would on the GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: The values of storages of at most so many bytes are kept; weights are never read.
KNOWN_BYTES = 4 << 20

_DEVICE = torch._C.TensorBase.device
CPU = torch.device("cpu")
META = torch.device("meta")


class Untraceable(RuntimeError):
    """The memory of an operation cannot be predicted without a GPU or without the weights' values."""


@dataclass(eq=False)
class Storage:
    """One storage of a fake tensor."""

    device: torch.device
    nbytes: int
    #: The address of the allocator's block; 0 for an empty storage and for one of the host.
    address: int = 0
    #: A tensor of the values, if they are known; else None.
    values: Any = None
    reference: Any = None


class Registry:
    """Every live storage of a fake tensor, by the address of its C++ object.

    Args:
        malloc: Called with a device's index and the bytes to allocate; returns the block's address.
        free: Called with a device's index and a block's address.
    """

    def __init__(self, malloc: Callable[[int, int], int], free: Callable[[int, int], None]) -> None:
        self._malloc, self._free = malloc, free
        self._storages: dict[int, Storage] = {}
        #: True while meta kernels in Python run, which must see meta tensors.
        self.plain = False

    def add(self, tensor: Any, device: torch.device) -> Storage:
        """Register a new meta tensor as one of a device; one of a GPU takes a block of its allocator until it dies."""
        untyped = tensor.untyped_storage()
        key, nbytes = untyped._cdata, untyped.nbytes()
        storage = Storage(device, nbytes)
        if device.type == "cuda" and nbytes:
            storage.address = self._malloc(device.index, nbytes)
        self._storages[key] = storage
        storage.reference = weakref.ref(untyped, lambda _: self._gone(key, storage))
        return storage

    def find(self, tensor: Any) -> Storage | None:
        """Return the entry of a fake tensor; None for a tensor of the host and for a real meta tensor."""
        if _DEVICE.__get__(tensor).type != "meta":
            return None
        return self._storages.get(tensor.untyped_storage()._cdata)

    def of_untyped(self, untyped: Any) -> Storage | None:
        """Return the entry of an untyped storage; None if it does not belong to a fake tensor."""
        return self._storages.get(untyped._cdata)

    def resized(self, tensor: Any) -> None:
        """Take a new block for a storage whose size has changed in place."""
        storage, untyped = self.find(tensor), tensor.untyped_storage()
        if storage is None or storage.nbytes == untyped.nbytes():
            return
        old, storage.nbytes, storage.values = storage.address, untyped.nbytes(), None
        if storage.device.type == "cuda":
            storage.address = self._malloc(storage.device.index, storage.nbytes) if storage.nbytes else 0
            if old:
                self._free(storage.device.index, old)

    def device_of(self, tensor: Any) -> torch.device:
        """Return a tensor's device: for a fake tensor the one that it pretends to be on."""
        storage = None if self.plain else self.find(tensor)
        return storage.device if storage is not None else _DEVICE.__get__(tensor)

    def values_of(self, tensor: Any) -> Any:
        """Return a tensor of the host with a tensor's values; None if they are unknown.

        The values of a fake tensor's views share memory just as the views do.
        """
        if _DEVICE.__get__(tensor).type != "meta":
            return tensor if is_readable(tensor) else None
        storage = self.find(tensor)
        if storage is None or storage.values is None:
            return None
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(storage.values, tensor.storage_offset(), tensor.size(), tensor.stride())

    def learn(self, tensor: Any, values: Any, limit: int | None = KNOWN_BYTES) -> None:
        """Store the values of a fake tensor that owns its storage, in the fake tensor's layout."""
        storage = self.find(tensor)
        if storage is None or (limit is not None and storage.nbytes > limit):
            return
        if values.stride() != tensor.stride() or values.untyped_storage().nbytes() != storage.nbytes:
            laid = torch.empty(storage.nbytes, dtype=torch.uint8).view(tensor.dtype)
            laid = laid.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            laid.copy_(values)
            values = laid
        storage.values = values.untyped_storage()

    def _gone(self, key: int, storage: Storage) -> None:
        if self._storages.get(key) is storage:
            del self._storages[key]
        if storage.address:
            self._free(storage.device.index, storage.address)


def is_readable(tensor: Any) -> bool:
    """Return true if a host tensor's values may be read: it is small, and not mapped from a file of weights."""
    untyped = tensor.untyped_storage()
    return untyped.nbytes() <= KNOWN_BYTES and untyped.filename is None
