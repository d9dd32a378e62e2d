"""A checkpoint's first layers as a checkpoint of their own: a folder with their tensors, and links to all else.

Weights, and all that a load does with them, are affine in the number of layers that are alike. So a gate that loads
four of eighty layers sees a change that a load of all would see, in a fraction of the time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.system.json_text import read_json
from pytest_llmload.worker.checkpoints.architecture import stored_tensors
from pytest_llmload.worker.checkpoints.build import check_space, write_header, write_json, write_once
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.headers import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    Stored,
    Tensor,
    layout,
    read_header,
    read_index,
    read_metadata,
)
from pytest_llmload.worker.checkpoints.layer_counts import cut_config
from pytest_llmload.worker.checkpoints.weights import read_tensors

#: Part of a cut folder's name: raise it when what is written into one changes.
VERSION = 1
_BLOCK = 8 << 20
#: Files that hold weights; no other file of a checkpoint is left out.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors.index.json")
#: Module path of a stack of layers -> the number of the first that is left out.
Stacks = dict[str, int]


def cut_checkpoint(source: Path, layers: int, cache_dir: Path, *, trust_remote_code: bool = False) -> Path:
    """Return a folder with the first ``layers`` layers of the checkpoint ``source``; written if it is not there yet.

    Only the tensors of those layers are read. Raises MachineError, in one sentence, where the model cannot be cut or
    the disk cannot hold it, LoadFailed where the files are damaged.
    """
    stacks = Cut(source, layers, trust_remote_code=trust_remote_code)

    def write(folder: Path) -> None:
        stacks.write_small(folder)
        by_file = {file: [stored for stored in read_header(file) if stacks.keeps(stored.tensor.name)] for file in files}
        check_space(f"the cut of {source.name} to {layers} layers", _bytes(by_file.values()), target)
        for file, kept in by_file.items():
            copy_tensors(file, folder / file.name, kept)
        if WEIGHTS not in {file.name for file in files}:
            names = {stored.tensor.name: file.name for file, kept in by_file.items() for stored in kept}
            metadata = {"total_size": _bytes(by_file.values())}
            write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(names.items()))})

    files = [source / name for name in stacks.files()]
    target = _target(cache_dir, source, layers, [source / "config.json", *files])
    write_once(target, write)
    return target


def cut_outline(source: Path, layers: int, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Fill an empty folder with the config of a cut, and with the headers of its weights where those are here; for
    planning. No weight is read. Raises as :func:`cut_checkpoint`.
    """
    stacks = Cut(source, layers, trust_remote_code=trust_remote_code)
    stacks.write_small(folder)
    try:
        files = stacks.files()
    except LoadFailed:
        return
    kept = [stored for name in files for stored in read_header(source / name) if stacks.keeps(stored.tensor.name)]
    write_header(folder / WEIGHTS, [stored.tensor for stored in kept])


class Cut:
    """What stays of a checkpoint that is cut: told from its config, on the meta device."""

    def __init__(self, source: Path, layers: int, *, trust_remote_code: bool = False) -> None:
        """Raise MachineError, in one sentence, where the model cannot be cut."""
        self._source = source
        config = read_config(source)
        self.config = cut_config(config, source, layers, trust_remote_code=trust_remote_code)
        with tempfile.TemporaryDirectory() as folder:
            self.write_small(Path(folder))
            whole = _tensors(source, trust_remote_code)
            cut = _tensors(Path(folder), trust_remote_code)
        self._kept = frozenset(cut)
        self._stacks = stacks(whole, cut, layers)

    def keeps(self, name: str) -> bool:
        """Return whether a tensor of the checkpoint's files belongs to what stays."""
        return name in self._kept or not _is_beyond(name, self._stacks)

    def files(self) -> list[str]:
        """Return the names of the files that hold tensors which stay. Raises LoadFailed where one is not here."""
        if (self._source / WEIGHTS).is_file():
            return [WEIGHTS]
        if not (self._source / INDEX).is_file():
            raise LoadFailed(f"{self._source} has no {WEIGHTS} and no {INDEX}, so it holds no weights that can be cut")
        names = {file for name, file in read_index(self._source / INDEX).items() if self.keeps(name)}
        if missing := sorted(name for name in names if not (self._source / name).is_file()):
            raise LoadFailed(f"{self._source / INDEX} names files that are missing: {', '.join(missing)}")
        return sorted(names)

    def indexed_files(self) -> list[str]:
        """Return the files that an index names for the tensors which stay; empty where there is no index."""
        index = self._source / INDEX
        return sorted({file for name, file in read_index(index).items() if self.keeps(name)} if index.is_file() else ())

    def write_small(self, folder: Path) -> None:
        """Write the cut config, and links to every file that holds no weights."""
        write_json(folder / "config.json", self.config)
        for path in self._source.iterdir():
            if path.name != "config.json" and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                (folder / path.name).symlink_to(path.resolve())


def _tensors(directory: Path, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    try:
        found = stored_tensors(directory, "F32", trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise MachineError(f"the model cannot be cut to some of its layers: {error}") from error
    return {tensor.name: tensor.shape for tensor in found}


def stacks(whole: Mapping[str, tuple[int, ...]], cut: Mapping[str, tuple[int, ...]], layers: int) -> Stacks:
    """Return where the layers stand that a cut leaves out, by the tensors of the whole model and of the cut one.

    Raises MachineError, in one sentence, where the cut model is not a part of the whole one.
    """
    if unlike := sorted(name for name, shape in cut.items() if whole.get(name) != shape):
        name = unlike[0]
        shapes = f"{list(cut[name])} in {layers} layers and {list(whole.get(name, ()))} in all"
        raise MachineError(f"the model cannot be cut to {layers} layers: its tensor {name} is {shapes}")
    modules = {name[:end] for name in cut for end in _ends(name)}
    found: Stacks = {}
    for name in whole.keys() - cut.keys():
        first = next(name[:end] for end in _ends(name) if name[:end] not in modules)
        stack, _, number = first.rpartition(".")
        if not number.isdigit():
            raise MachineError(f"the model cannot be cut to {layers} layers: that would take away {first} too")
        found[stack] = min(found.get(stack, int(number)), int(number))
    return found


def _ends(name: str) -> list[int]:
    """Return where each component of a tensor's name ends, the first component first."""
    return [index for index, character in enumerate(name) if character == "."] + [len(name)]


def _is_beyond(name: str, beyond: Stacks) -> bool:
    """Return whether a tensor belongs to a layer that is left out.

    Files may have been saved with or without the model's own prefix, and hold tensors that its class does not know.
    """
    parts = name.split(".")
    for position, part in enumerate(parts[1:], 1):
        stack = ".".join(parts[:position])
        if part.isdigit() and any(
            int(part) >= first and f".{stack}".endswith(f".{known}") | f".{known}".endswith(f".{stack}")
            for known, first in beyond.items()
        ):
            return True
    return False


def cut_adapter(source: Path, checkpoint: Path, layers: int, cache_dir: Path) -> Path:
    """Return a folder with what a PEFT adapter holds for the layers of a cut checkpoint; written at the first call.

    Raises MachineError where the disk cannot hold it, LoadFailed where the files are damaged.
    """
    beyond = _whole_stacks(read_tensors(checkpoint), layers)

    def write(folder: Path) -> None:
        config = read_json(source / ADAPTER_CONFIG)
        numbers = config.get("layers_to_transform") if isinstance(config, dict) else None
        if isinstance(numbers, list):
            config["layers_to_transform"] = [number for number in numbers if number < layers]
        write_json(folder / ADAPTER_CONFIG, config)
        kept = [
            stored for stored in read_header(source / ADAPTER_WEIGHTS) if not _is_beyond(stored.tensor.name, beyond)
        ]
        copy_tensors(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS, kept)

    target = _target(cache_dir, source, layers, [source / ADAPTER_CONFIG, source / ADAPTER_WEIGHTS])
    write_once(target, write)
    return target


def _whole_stacks(tensors: Iterable[Tensor], layers: int) -> Stacks:
    """Return the stacks of a cut checkpoint that have exactly ``layers`` layers."""
    numbers: dict[str, set[int]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        for position, part in enumerate(parts[1:], 1):
            if part.isdigit():
                numbers.setdefault(".".join(parts[:position]), set()).add(int(part))
                break
    return {stack: layers for stack, found in numbers.items() if found == set(range(layers))}


def _target(cache_dir: Path, source: Path, layers: int, files: Iterable[Path]) -> Path:
    """Return the folder of a cut: another one for other layers, and once a file has changed."""
    stats = [[file.name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return cache_dir / "cut" / f"{source.name}-{layers}-layers-{digest([VERSION, layers, stats], 12)}"


def _bytes(parts: Iterable[Iterable[Stored]]) -> int:
    return sum(stored.tensor.bytes for part in parts for stored in part)


def copy_tensors(source: Path, target: Path, kept: list[Stored]) -> None:
    """Write a safetensors file with some tensors of another one, and read no byte of the rest."""
    head, placed = layout([stored.tensor for stored in kept], read_metadata(source))
    read, write = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.pwrite(write, head, 0)
        for old, new in zip(kept, placed, strict=True):
            _copy(read, old.offset, write, new.offset, old.tensor.bytes)
        os.ftruncate(write, len(head) + _bytes([kept]))
    finally:
        os.close(read)
        os.close(write)


def _copy(read: int, begin: int, write: int, place: int, count: int) -> None:
    """Copy ``count`` bytes from one file to another."""
    while count:
        done = _copy_some(read, begin, write, place, min(count, _BLOCK))
        if not done:
            raise LoadFailed("a file of weights became shorter while it was read")
        begin, place, count = begin + done, place + done, count - done


def _copy_some(read: int, begin: int, write: int, place: int, count: int) -> int:
    try:
        return os.copy_file_range(read, write, count, begin, place)
    except OSError:
        # These file systems cannot copy within the kernel; a disk that is full says so once more.
        return os.pwrite(write, os.pread(read, count, begin), place)
