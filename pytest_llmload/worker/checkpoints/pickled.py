"""Read pickled checkpoints as transformers does: tensors only, and mapped into memory instead of read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.worker.checkpoints.headers import Tensor

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

#: torch's names of dtypes -> those of safetensors.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def read(path: Path) -> Iterator[tuple[Tensor, Any]]:
    """Yield the tensors of a pickled file, each with its description.

    Raises LoadFailed, with one sentence, if the file cannot be read as tensors alone: code in it is never run.
    """
    import torch

    try:
        # Files of torch before 1.6 are not archives, and cannot be mapped.
        mapped = _is_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # unpickling raises errors of many classes
        refused = re.search(r"WeightsUnpickler error: (.+)", str(error))
        first = refused[1] if refused else next(iter(str(error).strip().splitlines()), type(error).__name__)
        only = "cannot be read as tensors alone (weights_only), which transformers requires"
        raise LoadFailed(f"{path} {only}: {first}") from error
    if not isinstance(state, dict):
        raise LoadFailed(f"{path} contains a {type(state).__name__} instead of tensors by their names")
    for name, value in state.items():
        dtype = _DTYPES.get(str(getattr(value, "dtype", "")).removeprefix("torch."))
        if not isinstance(name, str) or dtype is None:
            raise LoadFailed(f"{path}: {name!r} is a {type(value).__name__} instead of a tensor of a known dtype")
        yield Tensor(name, tuple(value.shape), dtype), value


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


class Slice:
    """A tensor in memory, with the methods of safetensors' lazy slices."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPES[str(self._tensor.dtype).removeprefix("torch.")]

    def __getitem__(self, index: Any) -> Any:
        return self._tensor[index]


class PickledFile:
    """A pickled file that is open, with the method of safetensors' open files."""

    def __init__(self, path: Path) -> None:
        self._tensors = {tensor.name: value for tensor, value in read(path)}

    def get_slice(self, name: str) -> Slice:
        """Return a tensor of the file, of which only what is read comes into memory."""
        return Slice(self._tensors[name])
