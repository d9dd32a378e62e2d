"""Reading and laying out safetensors files without torch: 8 bytes of length, a JSON header, the tensors' bytes.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_llmload.core.errors import LoadFailed

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


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; ``dtype`` by safetensors' names: ``BF16``, ``F16``, ``U8`` …"""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class Stored:
    """A tensor and where its bytes begin in its file."""

    tensor: Tensor
    offset: int


def layout(tensors: Iterable[Tensor]) -> tuple[bytes, list[Stored]]:
    """The first bytes of a file that holds ``tensors`` in this order, and the place of each."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
    return head, [Stored(tensor, len(head) + begin) for tensor, begin in relative]


def read_header(path: Path) -> list[Stored]:
    """The tensors of a safetensors file, in the header's order; no weight is read.

    Raises LoadFailed, in one sentence, where the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first == b"version ":
            raise LoadFailed(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not length or 8 + length > size:
            raise LoadFailed(f"{path} is truncated or no safetensors file: its header should have {length} bytes, "
                             f"the file has {size}")  # fmt: skip
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        stored = [
            (Tensor(name, tuple(entry["shape"]), entry["dtype"]), *entry["data_offsets"])
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadFailed(f"{path} has no readable safetensors header ({type(error).__name__}: {error})") from error
    for tensor, begin, end in stored:
        if tensor.dtype not in _BITS:
            raise LoadFailed(f"{path}: tensor {tensor.name} has the unknown dtype {tensor.dtype}")
        if end - begin != tensor.bytes:
            raise LoadFailed(
                f"{path}: tensor {tensor.name} of {tensor.dtype} {list(tensor.shape)} needs {tensor.bytes} bytes, "
                f"its header gives it {end - begin}"
            )
    needed = 8 + length + max((end for _, _, end in stored), default=0)
    if needed != size:
        raise LoadFailed(f"{path} is damaged: its header describes {needed} bytes, the file has {size}")
    return [Stored(tensor, 8 + length + begin) for tensor, begin, _ in stored]


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> file, as an index has them.

    Raises LoadFailed, in one sentence, for what transformers cannot read and for files outside the index's folder.
    """
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        # transformers takes no index without it.
        weight_map, _ = dict(data["weight_map"]), dict(data["metadata"])
        outside = [name for name in weight_map.values() if Path(name).name != name]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadFailed(f"{index} is no readable index of weights ({type(error).__name__}: {error})") from error
    if outside:
        raise LoadFailed(f"{index} names {outside[0]!r}, which is no file name: weights lie beside their index")
    return weight_map


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that a load of ``directory`` reads, sorted.

    Raises LoadFailed, in one sentence, where there are none or where the index names files that are missing.
    """
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not index.is_file():
        others = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"only {', '.join(others)}: convert them to safetensors" if others else "so it holds no weights"
        raise LoadFailed(f"{directory} has no {WEIGHTS} and no {INDEX}, {hint}")
    names = sorted(set(read_index(index).values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise LoadFailed(f"{index} names {len(names)} files of which {len(missing)} are missing: {', '.join(missing)}")
    return [directory / name for name in names]


def read_tensors(directory: Path) -> list[Tensor]:
    """All tensors of a checkpoint, sorted by name.

    Raises LoadFailed as :func:`read_header`, and where the index has tensors in files that do not hold them.
    """
    held = {path.name: [stored.tensor for stored in read_header(path)] for path in weight_files(directory)}
    if WEIGHTS not in held:
        found = {(tensor.name, file) for file, tensors in held.items() for tensor in tensors}
        if wrong := sorted(set(read_index(directory / INDEX).items()) - found):
            name, file = wrong[0]
            more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
            raise LoadFailed(f"{directory / INDEX} says that {name} is in {file}, which does not hold it{more}")
    return sorted((tensor for tensors in held.values() for tensor in tensors), key=lambda tensor: tensor.name)
