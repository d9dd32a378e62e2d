"""No checkpoint key missing, mismatched or unexpected."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.loaded import Loaded

CHECK = "keys"
OPTION = "keys_ok"
#: Keys in a hint.
_HINTED = 3


def check(loaded: Loaded) -> Iterator[Problem]:
    """From the library's own account of the load; ``values`` judges loads that give none.

    The library has already taken out what the architecture ignores and what is tied
    (transformers, ``_adjust_missing_and_unexpected_keys``).
    """
    info = loaded.loading_info
    if info is None:
        return
    allowed = [str(pattern) for pattern in loaded.job.spec.option(OPTION, [])]
    for kind, message in (
        ("missing_keys", "not in the checkpoint, so their values are random"),
        ("mismatched_keys", "in the checkpoint with another shape, so their values are random"),
        ("unexpected_keys", "in the checkpoint, but not used by the model"),
    ):
        keys = sorted(key for key in info.get(kind, ()) if kind != "unexpected_keys" or not _allowed(key, allowed))
        if keys:
            hint = ""
            if kind == "unexpected_keys" and len(keys) <= _HINTED:
                strategy = loaded.job.spec.strategy
                hint = f"where that is as it should be: strategy({strategy!r}, {OPTION}={keys})"
            yield Problem(CHECK, f"{len(keys)} tensors are {message}", tuple(keys), _bytes(loaded, keys), hint)
    if info.get("error_msgs"):
        yield Problem(CHECK, "; ".join(info["error_msgs"]))
    ignored = [key for key in info.get("unexpected_keys", ()) if _allowed(key, allowed)]
    if ignored:
        loaded.notes.append(f"{len(ignored)} unexpected checkpoint keys are allowed by {OPTION}")


def _allowed(key: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _bytes(loaded: Loaded, keys: list[str]) -> int:
    wanted = set(keys)
    return sum(held.nbytes for held in loaded.inventory.held if held.path in wanted)
