"""Read and lay out safetensors files without torch: 8 bytes of length, a JSON header, the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.system.json_text import LARGEST, Unreadable, parse, read_json, short

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: The two files of an adapter.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: Bits of an element of each dtype, by safetensors' names.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


#: Limits: a tensor's dimensions, its sizes, and the bytes of a file's name.
_RANK, _LARGEST_SIZE, _LONGEST_NAME = 32, 1 << 50, 255


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; ``dtype`` is safetensors' name: ``BF16``, ``F16``, ``U8`` …"""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Return the size of its values."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, and the offset of its bytes in its file."""

    tensor: Tensor
    offset: int


def layout(tensors: Iterable[Tensor], metadata: dict[str, str] | None = None) -> tuple[bytes, list[StoredTensor]]:
    """Return the first bytes of a file that holds ``tensors`` in this order, and the place of each."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    relative, end = [], 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        relative.append((tensor, end))
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    head = struct.pack("<Q", len(text)) + text
    return head, [StoredTensor(tensor, len(head) + begin) for tensor, begin in relative]


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds beside its tensors. Raises as :func:`read_header`."""
    found = _read_header(path)[0].get("__metadata__") or {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file, in the header's order, without reading a weight.

    Raises LoadFailed, with one sentence, if the file is truncated or is not a safetensors file.
    """
    header, length = _read_header(path)
    header.pop("__metadata__", None)
    size = path.stat().st_size
    stored = [_entry(path, name, entry) for name, entry in header.items()]
    for tensor, begin, end in stored:
        if tensor.dtype not in _BITS:
            raise LoadFailed(f"{path}: tensor {short(tensor.name)} has the unknown dtype {short(tensor.dtype)}")
        if end - begin != tensor.bytes:
            raise LoadFailed(
                f"{path}: tensor {short(tensor.name, 200)} of {tensor.dtype} {list(tensor.shape)} needs "
                f"{tensor.bytes} bytes, its header gives it {end - begin}"
            )
    needed = 8 + length + max((end for _, _, end in stored), default=0)
    if needed != size:
        raise LoadFailed(f"{path} is damaged: its header describes {needed} bytes, the file has {size}")
    return [StoredTensor(tensor, 8 + length + begin) for tensor, begin, _ in stored]


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON of a header, and its bytes. Raises as :func:`read_header`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first == b"version ":
            raise LoadFailed(f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull")
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not length or 8 + length > size or length > LARGEST:
            raise LoadFailed(f"{path} is truncated or not a safetensors file: its header should have {length} bytes, "
                             f"the file has {size}")  # fmt: skip
        text = file.read(length)
    try:
        header = parse(text)
    except Unreadable as error:
        raise LoadFailed(f"{path} has no readable safetensors header: it {error}") from None
    if not isinstance(header, dict):
        raise LoadFailed(f"{path} has no readable safetensors header: it is {short(header)} instead of an object")
    return header, length


def _entry(path: Path, name: str, entry: object) -> tuple[Tensor, int, int]:
    """Return a header's tensor, and where its bytes begin and end among the data. Raises LoadFailed."""
    found: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise LoadFailed(
            f"{path} has no readable safetensors header: tensor {short(name)} is described as {short(entry, 120)}; "
            "expected are a dtype, a shape of whole numbers and two data_offsets"
        )
    return Tensor(name, tuple(shape), dtype), offsets[0], offsets[1]


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Return true if a value is a list of whole numbers within the limits for a file's sizes."""
    return (
        isinstance(value, list)
        and len(value) <= _RANK
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < _LARGEST_SIZE for size in value)
    )


def read_index(index: Path) -> dict[str, str]:
    """Return an index's file of each tensor.

    Raises LoadFailed, with one sentence, if transformers could not read the index or if a file is outside its folder.
    """
    try:
        data = read_json(index)
    except Unreadable as error:
        raise LoadFailed(f"{index} is not a readable index of weights: it {error}") from None
    weight_map, metadata = (data.get(key) if isinstance(data, dict) else None for key in ("weight_map", "metadata"))
    # transformers refuses an index without metadata.
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise LoadFailed(f"{index} is not a readable index of weights: it needs the objects weight_map and metadata")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_file_name(file):
            raise LoadFailed(
                f"{index} says that {short(tensor)} is in {short(file, 80)}, which is not a file name: weights must "
                "be in the folder of their index"
            )
    return weight_map


def _is_file_name(name: str) -> bool:
    return name.isprintable() and Path(name).name == name and len(name.encode()) <= _LONGEST_NAME
