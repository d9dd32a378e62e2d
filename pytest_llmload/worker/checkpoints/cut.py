"""A checkpoint's first layers of each kind as a checkpoint of their own: a folder with their tensors, and links to all
else.

Weights, and all that a load does with them, are affine in the number of layers that are alike. So a gate that loads
four of eighty layers sees a change that a load of all would see, in a fraction of the time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.units import counted
from pytest_llmload.system.json_text import read_json
from pytest_llmload.worker.checkpoints.build import check_space, write_header, write_json, write_once
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.headers import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    StoredTensor,
    Tensor,
    layout,
    read_header,
    read_index,
    read_metadata,
)
from pytest_llmload.worker.checkpoints.kept_layers import KeptLayers, Stacks, kept_layers
from pytest_llmload.worker.checkpoints.layer_counts import counts_to_cut, cut_config, nothing_left_out
from pytest_llmload.worker.checkpoints.layer_kinds import Kept, Outline, beginning, first_of_each, leaves_out

#: Part of a cut folder's name: raise it when what is written into one changes.
VERSION = 2
_BLOCK = 8 << 20
#: Files that hold weights; no other file of a checkpoint is left out.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors.index.json")


def cut_checkpoint(
    source: Path, layers: int, cache_dir: Path, *, trust_remote_code: bool = False
) -> tuple[Path, Stacks]:
    """Return a folder with the first ``layers`` layers of each kind of the checkpoint ``source``, written if it is not
    there yet, and the layers that it keeps of each stack.

    Only the tensors of those layers are read. Raises MachineError, in one sentence, where the model cannot be cut or
    the disk cannot hold it, LoadFailed where the files are damaged.
    """
    cut = Cut(source, layers, trust_remote_code=trust_remote_code)

    def write(folder: Path) -> None:
        cut.write_small(folder)
        by_file = {file: cut.kept(read_header(file)) for file in files}
        total = sum(map(_bytes, by_file.values()))
        check_space(f"the cut of {source.name} to {counted(layers, 'layer')}", total, target)
        for file, kept in by_file.items():
            copy_tensors(file, folder / file.name, kept)
        if WEIGHTS not in {file.name for file in files}:
            names = {tensor.name: file.name for file, kept in by_file.items() for _, tensor in kept}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            write_json(folder / INDEX, index)

    files = [source / name for name in cut.files()]
    target = _target(cache_dir, source, layers, [source / "config.json", *files])
    write_once(target, write)
    return target, cut.layers.stacks


def cut_outline(source: Path, layers: int, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Fill an empty folder with the config of a cut, and with the headers of its weights where those are here; for
    planning. No weight is read. Raises as :func:`cut_checkpoint`.
    """
    cut = Cut(source, layers, trust_remote_code=trust_remote_code)
    cut.write_small(folder)
    try:
        files = cut.files()
    except LoadFailed:
        return
    write_header(folder / WEIGHTS, [tensor for name in files for _, tensor in cut.kept(read_header(source / name))])


def cut_config_of(
    config: dict[str, Any], layers: int, *, trust_remote_code: bool = False
) -> tuple[dict[str, Any], Stacks]:
    """Return the config of a cut of a model that stands in no folder yet, and the layers that it keeps."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config)
        cut = Cut(Path(folder), layers, trust_remote_code=trust_remote_code)
        return cut.config, cut.layers.stacks


class Cut:
    """What stays of a checkpoint that is cut: told from its config, on the meta device."""

    def __init__(self, source: Path, layers: int, *, trust_remote_code: bool = False) -> None:
        """Raise MachineError, in one sentence, where the model cannot be cut."""
        self._source = source
        config = read_config(source)
        counts = counts_to_cut(config, source, layers, trust_remote_code=trust_remote_code)
        whole = _outline(source, trust_remote_code)
        kept = first_of_each(whole, counts, layers)
        try:
            self._keep(config, whole, kept, layers, trust_remote_code)
        except MachineError:
            # A config that spells its layers as a period cannot say that some in between are missing.
            if kept == beginning(kept):
                raise
            self._keep(config, whole, beginning(kept), layers, trust_remote_code)

    def _keep(self, config: dict[str, Any], whole: Outline, kept: Kept, layers: int, trust_remote_code: bool) -> None:
        """Keep these layers. Raises MachineError, in one sentence, where no config gives a model that has them."""
        if not leaves_out(kept):
            raise nothing_left_out(config, kept, layers, len(set(whole.kinds(max(kept)))))
        self.config = cut_config(config, self._source, kept, trust_remote_code=trust_remote_code)
        with tempfile.TemporaryDirectory() as folder:
            self.write_small(Path(folder))
            cut = _outline(Path(folder), trust_remote_code)
        self.layers = kept_layers(whole.tensors, cut.tensors, kept, layers)
        if not whole.is_cut_to(cut, kept):
            raise MachineError(
                f"the model cannot be cut to {counted(layers, 'layer')}: the first ones would be of other kinds"
            )
        if "quantization_config" in self.config:
            self.config["quantization_config"] = self.layers.in_names(self.config["quantization_config"])

    def keeps(self, name: str) -> bool:
        """Return whether a tensor of the checkpoint's files belongs to what stays."""
        return self.layers.placed(name) is not None

    def kept(self, header: Iterable[StoredTensor]) -> list[tuple[StoredTensor, Tensor]]:
        """Return the tensors of a file that stay, each with its name in the cut."""
        names = ((stored, self.layers.placed(stored.tensor.name)) for stored in header)
        return [(stored, replace(stored.tensor, name=name)) for stored, name in names if name is not None]

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


def _outline(directory: Path, trust_remote_code: bool) -> Outline:
    try:
        return Outline.of(directory, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise MachineError(f"the model cannot be cut to some of its layers: {error}") from error


def cut_adapter(source: Path, stacks: Stacks, layers: int, cache_dir: Path) -> Path:
    """Return a folder with what a PEFT adapter holds for the layers of a cut, whose ``stacks`` name those that stay;
    written at the first call.

    Raises MachineError where the disk cannot hold it, LoadFailed where the files are damaged.
    """
    kept_ones = KeptLayers(stacks)

    def write(folder: Path) -> None:
        config = read_json(source / ADAPTER_CONFIG)
        if isinstance(config, dict):
            config = kept_ones.in_names(config)
            numbers = config.get("layers_to_transform")
            if isinstance(numbers, list):
                config["layers_to_transform"] = kept_ones.in_numbers(numbers)
        write_json(folder / ADAPTER_CONFIG, config)
        names = ((stored, kept_ones.placed(stored.tensor.name)) for stored in read_header(source / ADAPTER_WEIGHTS))
        kept = [(stored, replace(stored.tensor, name=name)) for stored, name in names if name is not None]
        copy_tensors(source / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS, kept)

    files = [source / ADAPTER_CONFIG, source / ADAPTER_WEIGHTS]
    target = _target(cache_dir, source, layers, files, [sorted(stacks.items())])
    write_once(target, write)
    return target


def _target(cache_dir: Path, source: Path, layers: int, files: Iterable[Path], more: Iterable[object] = ()) -> Path:
    """Return the folder of a cut: a different one for other layers, and once a file has changed."""
    stats = [[file.name, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return cache_dir / "cut" / f"{source.name}-{layers}-layers-{digest([VERSION, layers, stats, *more], 12)}"


def _bytes(kept: Iterable[tuple[StoredTensor, Tensor]]) -> int:
    return sum(tensor.bytes for _, tensor in kept)


def copy_tensors(source: Path, target: Path, kept: list[tuple[StoredTensor, Tensor]]) -> None:
    """Write a safetensors file with some tensors of another one, each by its new name, and read no byte of the rest."""
    head, placed = layout([tensor for _, tensor in kept], read_metadata(source))
    read, write = os.open(source, os.O_RDONLY), os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.pwrite(write, head, 0)
        for (old, _), new in zip(kept, placed, strict=True):
            _copy(read, old.offset, write, new.offset, old.tensor.bytes)
        os.ftruncate(write, len(head) + _bytes(kept))
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
