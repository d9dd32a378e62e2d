"""Build a checkpoint directory with random weights from a config, once and atomically."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.checkpoints import random_values
from pytest_llmload.worker.checkpoints.architecture import meta_model, stored_dtype, tensors_of, text_part
from pytest_llmload.worker.checkpoints.headers import INDEX, WEIGHTS, StoredTensor, Tensor, layout
from pytest_llmload.worker.checkpoints.threads import workers
from pytest_llmload.worker.checkpoints.tokenizer import special_tokens, write_tokenizer

#: Part of a built directory's name. Increase it if any file other than the weights changes.
VERSION = 2
#: The most bytes of a file of weights, unless one tensor alone is larger.
SHARD_BYTES = 2 * 10**9
#: Elements that one task of the thread pool generates and writes.
_CHUNK = 1 << 20
#: Bytes that must stay free on the disk, since other processes may write meanwhile.
_SPARE_BYTES = 256 << 20


def built_path(config: dict[str, Any], name: str, cache_dir: Path) -> Path:
    """Return the directory of a config's checkpoint in the cache; its name depends on the config's content."""
    return cache_dir / "checkpoints" / f"{name}-{digest([VERSION, random_values.VERSION, config], 12)}"


def build(
    config: dict[str, Any], name: str, cache_dir: Path, *, trust_remote_code: bool = False, with_values: bool = True
) -> Path:
    """Return the directory of a checkpoint with random weights; build it if it does not exist.

    If two processes request the same one, it is built once. Raises MachineError if the disk is too small or cannot be
    written, ValueError if the installed transformers does not know the config's architecture.
    """

    def write(directory: Path) -> None:
        write_json(directory / "config.json", config)
        model = meta_model(directory, trust_remote_code=trust_remote_code)
        tensors = tensors_of(model, stored_dtype(config))
        needed = sum(tensor.bytes for tensor in tensors) if with_values else 0
        check_space(f"the random checkpoint {target.name}", needed, target)
        if with_values:
            write_weights(directory, tensors)
        else:
            write_weights(directory, tensors, write=write_header)
        text = text_part(config)
        if isinstance(text.get("vocab_size"), int):
            write_tokenizer(directory, text)
            write_json(directory / "generation_config.json", _generation_config(text, model))

    target = built_path(config, name, cache_dir)
    write_once(target, write)
    return target


def _generation_config(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return settings for greedy runs in which no token ends a sequence, so that N tokens are N for any weights.

    Those that the model's own class of settings knows: a class that denoises blocks of tokens refuses the others.
    """
    special: dict[str, Any] = {f"{role}_id": number for role, (_, number) in special_tokens(config).items()}
    special.pop("eos_token_id", None)
    if config.get("is_encoder_decoder"):
        # The token that a decoder starts with; without one, transformers refuses to generate.
        given = (config.get("decoder_start_token_id"), special.get("pad_token_id"), special.get("bos_token_id"), 0)
        special["decoder_start_token_id"] = next(number for number in given if isinstance(number, int))
    own = getattr(model, "generation_config", None)
    settings = {"do_sample": False, **special}
    return {name: value for name, value in settings.items() if own is None or hasattr(own, name)}


def write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a directory and rename it to ``target``, so that ``target`` is never incomplete.

    Do nothing if ``target`` exists. Raises MachineError if the disk cannot be written.
    """
    from filelock import FileLock

    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not target.is_dir():
                _write_beside(target, write)
    except OSError as error:
        raise MachineError(
            f"cannot write {target} ({error.strerror or error}); name a different directory with --llm-cache-dir"
        ) from error


def _write_beside(target: Path, write: Callable[[Path], None]) -> None:
    for abandoned in target.parent.glob(f".{target.name}.*/"):  # by a process that was killed: the lock is ours
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(
    what: str, needed: int, target: Path, remedy: str = "name a different directory with --llm-cache-dir"
) -> None:
    """Raise MachineError, before anything is written, where the disk cannot hold what is to be ``target``."""
    free = shutil.disk_usage(target.parent).free
    if needed + _SPARE_BYTES > free:
        raise MachineError(
            f"{what} needs {format_bytes(needed + _SPARE_BYTES)} in {target.parent}, "
            f"where {format_bytes(free)} are free; make room or {remedy}"
        )


def write_weights(
    directory: Path,
    tensors: list[Tensor],
    shard_bytes: int = SHARD_BYTES,
    write: Callable[[Path, list[Tensor]], None] | None = None,
) -> None:
    """Write ``tensors`` with random values, as one safetensors file or as shards with an index."""
    write = write or write_file
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write(directory / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.bytes for tensor in tensors)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _shards(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    for tensor in tensors:
        if shard and sum(item.bytes for item in shard) + tensor.bytes > limit:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_header(path: Path, tensors: list[Tensor]) -> None:
    """Write a safetensors file with its header and its full size, but without values, as a sparse file."""
    head, _ = layout(tensors)
    with path.open("xb") as file:
        file.write(head)
        file.truncate(len(head) + sum(tensor.bytes for tensor in tensors))


def write_file(path: Path, tensors: list[Tensor]) -> None:
    """Write one safetensors file with random values, in parallel by ranges of elements."""
    head, stored = layout(tensors)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.pwrite(file, head, 0)
        os.ftruncate(file, len(head) + sum(tensor.bytes for tensor in tensors))
        tasks = [(item, start) for item in stored for start in range(0, _elements(item.tensor), _CHUNK)]
        with ThreadPoolExecutor(workers()) as pool:
            for future in [pool.submit(_write_range, file, item, start) for item, start in tasks]:
                future.result()
    finally:
        os.close(file)


def _elements(tensor: Tensor) -> int:
    # Integers (counters, indices) stay zero: a file's untouched bytes.
    return tensor.bytes // random_values.FLOATING[tensor.dtype] if tensor.dtype in random_values.FLOATING else 0


def _write_range(file: int, item: StoredTensor, start: int) -> None:
    tensor = item.tensor
    stop = min(start + _CHUNK, _elements(tensor))
    data = random_values.bits(tensor.name, tensor.shape, tensor.dtype, start, stop).data.cast("B")
    offset = item.offset + start * random_values.FLOATING[tensor.dtype]
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with a final line end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
