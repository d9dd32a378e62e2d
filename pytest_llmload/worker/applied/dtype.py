"""Dense floating parameters in the dtype that was asked for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.checkpoint_names import CheckpointNames
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.quantstate import stored
from pytest_llmload.worker.tensors import Held, Inventory

CHECK = "dtype"
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: Floating dtypes that only a quantised checkpoint has.
_NARROW = ("float8", "float4")
#: safetensors' names of dtypes.
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def check(loaded: Loaded) -> Iterator[Problem]:
    """Parameters only: buffers (rotary frequencies …) are as the model declares them.

    Parameters that the model class pins to fp32 are noted. Without a dtype in the spec, what the checkpoint says holds,
    its config or its file; a user's own loader is then free. What a quantised checkpoint stores beside its weights
    (scales) stays as it is stored.
    """
    spec = loaded.job.spec
    # The checkpoint's own; the live config may have been changed by the load.
    config = read_config(Path(loaded.job.checkpoint.path))
    if spec.dtype is not None:
        expected, source = NAMES[spec.dtype], "was asked for"
    else:
        expected, source = _configured(config), "is what the checkpoint says"
    if not expected or (spec.dtype is None and spec.strategy == "loader"):
        return
    may_be_as_stored = spec.dtype is None or bool(config.get("quantization_config"))
    wrong: dict[str, list[Held]] = defaultdict(list)
    pinned: list[Held] = []
    for held in loaded.inventory.parameters():
        if held.dtype == expected or not _is_dense(loaded.inventory, held):
            continue
        if held.dtype == "float32" and _is_pinned(loaded.inventory, held.path, expected):
            pinned.append(held)
        elif not (may_be_as_stored and held.dtype == _stored_dtype(loaded.checkpoint_names, held.path)):
            wrong[held.dtype].append(held)
    for dtype, found in wrong.items():
        size = sum(held.nbytes for held in found)
        yield Problem(
            CHECK,
            f"{expected} {source}, but {len(found)} parameters ({format_bytes(size)}) are {dtype}",
            tuple(f"{held.path} ({format_bytes(held.nbytes)})" for held in found),
            size,
        )
    if pinned:
        names = ", ".join(held.path for held in pinned[:8])
        loaded.notes.append(f"{len(pinned)} parameters are float32 because the model class pins them: {names}")


def _configured(config: dict[str, Any]) -> str:
    for part in (config, config.get("text_config") or {}):
        value = part.get("dtype") or part.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return ""


def _stored_dtype(names: CheckpointNames, path: str) -> str:
    name = names.find(path)
    return _STORED.get(names.files.slice(name).get_dtype(), "") if name is not None else ""


def _is_dense(inventory: Inventory, held: Held) -> bool:
    if not held.dtype.startswith(("float", "bfloat")) or held.dtype.startswith(_NARROW):
        return False
    return stored(inventory.modules[held.module], held.name) is None


def _is_pinned(inventory: Inventory, name: str, expected: str) -> bool:
    """Whether a class keeps the parameter in fp32: for float16, or (``_strict``) for bfloat16 too.

    transformers 5 searches each pattern anywhere in the name, with ``*`` for anything (``build_glob_alternation``).
    """
    lists = ("_keep_in_fp32_modules_strict", *(("_keep_in_fp32_modules",) if expected == "float16" else ()))
    patterns = {
        str(pattern)
        for module in inventory.modules.values()
        for kind in lists
        for pattern in getattr(module, kind, None) or ()
    }
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
