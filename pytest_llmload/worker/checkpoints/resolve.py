"""Find the files of a model's SPEC on this machine, or download or build them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.presets import PREFIX, PRESETS, config_of
from pytest_llmload.worker.checkpoints import random_values
from pytest_llmload.worker.checkpoints.build import build
from pytest_llmload.worker.checkpoints.cut import cut_checkpoint
from pytest_llmload.worker.checkpoints.digests import (
    random_weights_digest,
    read_config,
    shape_digest,
    weights_digest,
)
from pytest_llmload.worker.checkpoints.headers import Tensor, read_tensors, weight_files
from pytest_llmload.worker.checkpoints.hub import download_model
from pytest_llmload.worker.checkpoints.layer_counts import cut_dict


def resolve(
    spec: str,
    cache_dir: Path,
    *,
    trust_remote_code: bool = False,
    with_values: bool = True,
    layers: int | None = None,
    tell: Callable[[int, Path], None] = lambda size, folder: None,
) -> Checkpoint:
    """Return the files of a hub id, ``hub-id@revision``, directory, ``random:PRESET`` or ``random:PATH``; with
    ``layers``, of a model that has only so many of its first layers. ``tell`` is called before weights are downloaded,
    with their bytes and the folder that they go to.

    Raises ValueError for a spec that can be none of these, MachineError where a download or the disk fails, LoadFailed
    where the files are there and damaged; each in one sentence.
    """
    if spec.startswith(PREFIX):
        # Kept apart from the checkpoints with values, which are loaded.
        folder = cache_dir if with_values else cache_dir / "without-values"
        return _random(spec, folder, trust_remote_code, with_values, layers)
    directory = Path(spec).expanduser()
    if directory.is_dir():
        found, revision = directory.resolve(), ""
    else:
        found = download_model(spec, trust_remote_code=trust_remote_code, layers=layers, tell=tell)
        revision = found.name
    if layers is not None:
        found = cut_checkpoint(found, layers, cache_dir, trust_remote_code=trust_remote_code)
    return _directory(found, cache_dir, revision)


def _random(spec: str, cache_dir: Path, trust_remote_code: bool, with_values: bool, layers: int | None) -> Checkpoint:
    config = config_of(spec)
    if layers is not None:
        config = cut_dict(config, layers, trust_remote_code=trust_remote_code)
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
    return _checkpoint(path, config, tensors, random_weights_digest(random_values.VERSION, tensors))


def _directory(path: Path, cache_dir: Path, revision: str = "") -> Checkpoint:
    try:
        config, tensors = read_config(path), read_tensors(path)
        return _checkpoint(path, config, tensors, weights_digest(path, cache_dir), revision)
    except OSError as error:
        raise MachineError(
            f"cannot read the checkpoint {path} or keep its digest in {cache_dir} (--llm-cache-dir): "
            f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        ) from error


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
