"""Find the files of a model's SPEC on this machine, or download or build them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.presets import PREFIX, PRESETS, config_of
from pytest_llmload.worker.checkpoints import random_values
from pytest_llmload.worker.checkpoints.build import build
from pytest_llmload.worker.checkpoints.cut import cut_checkpoint, cut_config_of
from pytest_llmload.worker.checkpoints.digests import (
    random_weights_digest,
    read_config,
    shape_digest,
    weights_digest,
)
from pytest_llmload.worker.checkpoints.gguf_files import adopted, in_folder
from pytest_llmload.worker.checkpoints.headers import ADAPTER_CONFIG, Tensor
from pytest_llmload.worker.checkpoints.hub import download_model
from pytest_llmload.worker.checkpoints.kept_layers import Stacks
from pytest_llmload.worker.checkpoints.weights import NoWeights, read_tensors, weight_files


def resolve(
    spec: str,
    cache_dir: Path,
    *,
    trust_remote_code: bool = False,
    with_values: bool = True,
    layers: int | None = None,
    tell: Callable[[int, Path], None] = lambda size, folder: None,
) -> Checkpoint:
    """Return the files of a hub id, ``hub-id@revision``, directory, GGUF file, ``random:PRESET`` or ``random:PATH``;
    with ``layers``, of a model that has only the first so many layers of each kind.

    ``tell`` is called before weights are downloaded, with their bytes and the folder that they go to. What only code of
    the user's may load is returned too, with the reason (``unreadable``).

    Raises ValueError for a spec that can be none of these, MachineError where a download or the disk fails, LoadFailed
    where the files are there and damaged; each in one sentence.
    """
    if spec.startswith(PREFIX):
        # Kept apart from the checkpoints with values, which are loaded.
        folder = cache_dir if with_values else cache_dir / "without-values"
        return _random(spec, folder, trust_remote_code, with_values, layers)
    directory = Path(spec).expanduser()
    if directory.exists():
        found, revision = directory.resolve(), ""
    else:
        found = download_model(spec, trust_remote_code=trust_remote_code, layers=layers, tell=tell)
        revision = found.name
    kept: Stacks = {}
    if layers is not None:
        found, kept = cut_checkpoint(found, layers, cache_dir, trust_remote_code=trust_remote_code)
    return dataclasses.replace(_directory(found, cache_dir, revision), kept_layers=kept)


def _random(spec: str, cache_dir: Path, trust_remote_code: bool, with_values: bool, layers: int | None) -> Checkpoint:
    config = config_of(spec)
    kept: Stacks = {}
    if layers is not None:
        config, kept = cut_config_of(config, layers, trust_remote_code=trust_remote_code)
    what = spec.removeprefix(PREFIX)
    name = what if what in PRESETS else str(config["model_type"])
    path = build(config, name, cache_dir, trust_remote_code=trust_remote_code, with_values=with_values)
    try:
        read_config(path)
        tensors = read_tensors(path)
    except LoadFailed as error:
        # This package built the checkpoint, so the model is not at fault.
        raise MachineError(
            f"the random checkpoint in {path} has been damaged since it was built; delete that folder, and the next "
            f"run builds it again ({error})"
        ) from None
    found = _checkpoint(path, config, tensors, random_weights_digest(random_values.VERSION, tensors))
    return dataclasses.replace(found, kept_layers=kept)


def _directory(path: Path, cache_dir: Path, revision: str = "") -> Checkpoint:
    try:
        files = _weights_here(path)
        if isinstance(files, NoWeights):
            # Code of the user's may load it: told by the names and the content of all its files.
            every = sorted(each for each in path.iterdir() if each.is_file())
            shape = digest([[each.name, each.stat().st_size] for each in every], 16)
            size = sum(each.stat().st_size for each in every)
            return Checkpoint(str(path), shape, weights_digest(every, cache_dir), revision, size, unreadable=str(files))
        if files[0].suffix == ".gguf":
            path = adopted(files[0], cache_dir)
        return _checkpoint(path, read_config(path), read_tensors(path), weights_digest(files, cache_dir), revision)
    except OSError as error:
        raise MachineError(
            f"cannot read the checkpoint {path} or keep its digest in {cache_dir} (--llm-cache-dir): "
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        ) from error


def _weights_here(path: Path) -> list[Path] | NoWeights:
    """Return the weight files of a folder, or that one GGUF file; the error where transformers would load none."""
    if path.is_file():
        if path.suffix != ".gguf":
            return NoWeights(f"{path} is a file: name its folder, or a GGUF file")
        return [path]
    has_config = bool(read_config(path)) or (path / "config.json").is_file()
    if not has_config and (path / ADAPTER_CONFIG).is_file():
        raise LoadFailed(f"{path} has no config.json: it is a PEFT adapter, name it with --llm-adapter")
    if not has_config and not in_folder(path):
        return NoWeights(f"{path} has no config.json: it is not a transformers checkpoint")
    try:
        return weight_files(path)
    except NoWeights as error:
        return error


def _checkpoint(
    path: Path, config: dict[str, Any], tensors: list[Tensor], weights: str, revision: str = ""
) -> Checkpoint:
    return Checkpoint(
        path=str(path),
        shape=shape_digest(config, tensors),
        weights=weights,
        revision=revision,
        bytes=sum(file.stat().st_size for file in weight_files(path)),
        model_type=str(config.get("model_type", "")),
    )
