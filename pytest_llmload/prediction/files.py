"""Weights as the headers of their files describe them: only the header of a file is read."""

from __future__ import annotations

from typing import Any

import safetensors
import torch
from safetensors.torch import _TYPES

from pytest_llmload.prediction.fake_tensors import CPU, META, Registry


def fake_safe_open(registry: Registry) -> Any:
    """Return a class that stands in for ``safetensors.safe_open`` and returns fake tensors."""
    real: Any = safetensors.safe_open

    def read(described: Any, device: Any) -> Any:
        shape = described.get_shape()
        fake = torch.empty(shape, dtype=_TYPES[described.get_dtype()], device=META)
        registry.add(fake, CPU)
        return fake.to(device) if torch.device(device).type != "cpu" else fake

    class Slice:
        """The result of ``get_slice``: a tensor of which only the indexed part is read."""

        def __init__(self, described: Any, device: Any) -> None:
            self._described, self._device = described, device
            self.get_shape, self.get_dtype = described.get_shape, described.get_dtype

        def __getitem__(self, index: Any) -> Any:
            whole = read(self._described, CPU)
            part = whole if index is Ellipsis else whole[index].clone()
            return part.to(self._device) if torch.device(self._device).type != "cpu" else part

    class FakeSafeOpen:
        """A safetensors file of which only the header is read."""

        def __init__(self, filename: Any, framework: str = "pt", device: Any = "cpu", **options: Any) -> None:
            self._file: Any = real(filename, framework=framework, device="cpu", **options)
            self._device = f"cuda:{device}" if isinstance(device, int) else device

        def __enter__(self) -> FakeSafeOpen:
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            return read(self._file.get_slice(name), self._device)

        def get_slice(self, name: str) -> Any:
            return Slice(self._file.get_slice(name), self._device)

        def get_tensors(self, *names: str) -> dict[str, Any]:
            return {name: self.get_tensor(name) for name in names or self._file.keys()}

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    return FakeSafeOpen
