"""No checkpoint key missing, mismatched or unexpected."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "keys"
OPTION = "keys_ok"
#: Keys in a hint.
HINTED = 3


def check(loaded: Loaded) -> Iterator[Problem]:
    """Read the library's own account of the load; what it does not tell is for :mod:`checkpoint_coverage`.

    The library has already taken out what the architecture ignores and what is tied
    (transformers, ``_adjust_missing_and_unexpected_keys``).
    """
    info = loaded.loading_info
    if info is None:
        return
    for kind, message in (
        ("missing_keys", "not in the checkpoint, so the values are random"),
        ("mismatched_keys", "in the checkpoint with a different shape, so the values are random"),
        ("unexpected_keys", "in the checkpoint, but not used by the model"),
    ):
        keys = sorted(key for key in info.get(kind, ()) if kind != "unexpected_keys" or not is_allowed(loaded, {key}))
        if keys:
            said = _allowing(loaded, keys) if kind == "unexpected_keys" else ""
            what = counted(len(keys), "tensor is", "tensors are")
            yield Problem(CHECK, f"{what} {message}", tuple(keys), _bytes(loaded, keys), said)
    if info.get("error_msgs"):
        yield Problem(CHECK, "; ".join(info["error_msgs"]))
    ignored = [key for key in info.get("unexpected_keys", ()) if is_allowed(loaded, {key})]
    if ignored:
        what = counted(len(ignored), "unexpected checkpoint key is", "unexpected checkpoint keys are")
        loaded.notes.append(f"{what} allowed by {OPTION}")


def _allowing(loaded: Loaded, keys: list[str]) -> str:
    """Return the hint for unexpected keys, by patterns where there are many; empty where that takes too many."""
    names = loaded.checkpoint_names
    used = {names.target(name) for name in names.files.where} - set(keys)
    found = keys if len(keys) <= HINTED else patterns(keys, used)
    return hint(loaded, found) if len(found) <= HINTED else ""


def is_allowed(loaded: Loaded, names: set[str]) -> bool:
    """Return whether the test allows a tensor of the checkpoint, by one of its names, not to be in the model."""
    return any(fnmatch.fnmatchcase(name, str(each)) for name in names for each in loaded.job.spec.option(OPTION, []))


def hint(loaded: Loaded, keys: list[str]) -> str:
    """Return what to write where the tensors are not in the model on purpose."""
    return f"if that is intended: strategy({loaded.job.spec.strategy!r}, {OPTION}={keys})"


def patterns(unused: list[str], claimed: set[str]) -> list[str]:
    """Return names for ``keys_ok``: ``model.layers.31.*`` where nothing below it is in use."""
    found = dict.fromkeys(unused)
    for name in unused:
        parts = name.split(".")
        above = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        free = next((prefix for prefix in above if not any(other.startswith(prefix) for other in claimed)), None)
        if free is not None:
            found.pop(name)
            found[f"{free}*"] = None
    return list(found)


def _bytes(loaded: Loaded, keys: list[str]) -> int:
    wanted = set(keys)
    inventory = loaded.inventory
    return sum(held.nbytes for held in inventory.held if inventory.base_path(held) in wanted)
