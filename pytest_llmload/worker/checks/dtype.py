"""Check that dense floating parameters have the requested dtype."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch

from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.core.units import counted, plural
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checkpoints.digests import read_config
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.checks.problem_names import named, size_of, sized
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import Held, Inventory
from pytest_llmload.worker.planning.planner import load_dtype

CHECK = "dtype"
#: Floating dtypes that only a quantised checkpoint has.
_NARROW = ("float8", "float4")
#: safetensors' names of dtypes.
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare the dtypes of parameters only: buffers (rotary frequencies …) are as the model declares them.

    An adapter has its own dtype. Parameters that the model class pins to a different dtype are noted. Without a dtype
    in the spec, what the checkpoint says holds, its config or its file; a user's own loader is then free. What a
    quantised checkpoint stores beside its weights (scales) stays as it is stored.
    """
    spec = loaded.job.spec
    if spec.dtype is None and loaded.own_code:
        return
    expected = str(load_dtype(loaded.job)).removeprefix("torch.")
    # The checkpoint's own; the live config may have been changed by the load.
    prequantised = bool(read_config(Path(loaded.job.checkpoint.path)).get("quantization_config"))
    inventory = loaded.inventory
    may_be_as_stored = spec.dtype is None or prequantised
    others = [
        held
        for held in inventory.parameters()
        if held.dtype != expected
        and _is_dense(inventory, held)
        and not (may_be_as_stored and held.dtype == _stored_dtype(loaded.checkpoint_names, inventory.base_path(held)))
    ]
    pinned = pinned_parameters(loaded, others, expected) if others else []
    wrong: dict[str, list[Held]] = defaultdict(list)
    for held in others:
        if held not in pinned:
            wrong[held.dtype].append(held)
    source = "is what the checkpoint says" if spec.dtype is None else "was requested"
    for dtype, found in wrong.items():
        yield Problem(
            CHECK,
            f"{expected} {source}, but {sized(found, 'parameter')} {plural(len(found), 'is', 'are')} {dtype}",
            named(found),
            size_of(found),
        )
    if pinned:
        names = ", ".join(held.path for held in pinned[:8])
        what = counted(len(pinned), "parameter")
        loaded.notes.append(f"the model class pins {what} to {pinned[0].dtype}: {names}")


def _stored_dtype(names: CheckpointNames, path: str) -> str:
    name = names.find(path)
    return _STORED.get(names.files.slice(name).get_dtype(), "") if name is not None else ""


def _is_dense(inventory: Inventory, held: Held) -> bool:
    if not held.dtype.startswith(("float", "bfloat")) or held.dtype.startswith(_NARROW):
        return False
    return inventory.stored(held) is None


def pinned_parameters(loaded: Loaded, candidates: list[Held], expected: str) -> list[Held]:
    """Return the parameters that the model class keeps in their dtype, whatever dtype the load is in.

    It does so by its lists of names (:func:`kept_in_fp32`), or because it declares them so: then a model without values
    that is built in the load's dtype has them in that dtype too.
    """
    patterns = kept_in_fp32(loaded, expected)
    pinned = [
        held for held in candidates if held.dtype == "float32" and is_kept(loaded.inventory.base_path(held), patterns)
    ]
    rest = [held for held in candidates if held not in pinned]
    if not rest:
        return pinned
    spec = loaded.job.spec
    try:
        declared = meta_model(
            Path(loaded.job.checkpoint.path),
            trust_remote_code=loaded.job.trust_remote_code,
            dtype=getattr(torch, expected),
            auto_class=spec.auto_class,
        )
    except ValueError as error:
        # A user's own loader may build what transformers does not know.
        loaded.notes.append(f"what the model class declares could not be asked: {error}")
        return pinned
    dtypes = {name: str(param.dtype).removeprefix("torch.") for name, param in declared.named_parameters()}
    return pinned + [held for held in rest if dtypes.get(loaded.inventory.base_path(held)) == held.dtype]


def kept_in_fp32(loaded: Loaded, expected: str) -> set[str]:
    """Return patterns of what the class keeps in fp32.

    It does so for float16 and by quantisers, or (``_strict``) for bfloat16 too.
    """
    kinds = ["_keep_in_fp32_modules_strict"]
    if expected == "float16" or loaded.job.spec.quant != AS_STORED:
        kinds.append("_keep_in_fp32_modules")
    modules = loaded.inventory.modules.values()
    return {str(pattern) for module in modules for kind in kinds for pattern in getattr(module, kind, None) or ()}


def is_kept(name: str, patterns: set[str]) -> bool:
    """Return whether a pattern matches the name.

    transformers 5 searches each pattern anywhere in the name, ``*`` is anything (``build_glob_alternation``).
    """
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
