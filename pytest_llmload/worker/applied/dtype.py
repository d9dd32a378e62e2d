"""Dense floating parameters in the dtype that was asked for."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.worker.loaded import Loaded
from pytest_llmload.worker.quantstate import stored
from pytest_llmload.worker.tensors import Held, Inventory

CHECK = "dtype"
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: Floating dtypes that only a quantised checkpoint has.
_NARROW = ("float8", "float4")


def check(loaded: Loaded) -> Iterator[Problem]:
    """Parameters only: buffers (rotary frequencies …) are as the model declares them. An adapter has its own dtype.

    Parameters that the model class pins to fp32 are noted. Without a dtype in the spec, what the checkpoint's config
    says holds; a user's own loader is then free.
    """
    spec = loaded.job.spec
    if spec.dtype is not None:
        expected, source = NAMES[spec.dtype], "was asked for"
    else:
        expected, source = _configured(loaded), "is what the checkpoint says"
    if not expected or (spec.dtype is None and spec.strategy == "loader"):
        return
    wrong: dict[str, list[Held]] = defaultdict(list)
    pinned: list[Held] = []
    for held in loaded.inventory.parameters():
        if not _is_dense(loaded.inventory, held) or held.dtype == expected:
            continue
        if held.dtype == "float32" and _is_pinned(loaded.model, loaded.inventory.base_path(held), expected):
            pinned.append(held)
        else:
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


def _configured(loaded: Loaded) -> str:
    """The dtype that the checkpoint's own config.json names; the live config may have been changed by the load."""
    config = json.loads((Path(loaded.job.checkpoint.path) / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config") or {}):
        value = part.get("dtype") or part.get("torch_dtype")
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return ""


def _is_dense(inventory: Inventory, held: Held) -> bool:
    if not held.dtype.startswith(("float", "bfloat")) or held.dtype.startswith(_NARROW):
        return False
    return stored(inventory.modules[held.module], held.name) is None


def _is_pinned(model: Any, name: str, expected: str) -> bool:
    """Whether the class keeps the parameter in fp32: for float16, or (``_strict``) for bfloat16 too.

    transformers matches module names as parts of the path, with ``*`` for numbers (``_get_dtype_plan``).
    """
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if expected == "float16":
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return any(
        re.search(rf"(^|\.){re.escape(pattern).replace(chr(92) + '*', '[^.]+')}(\.|$)", name) for pattern in patterns
    )
