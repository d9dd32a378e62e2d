"""Check that the requested attention implementation is in use."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "attention"


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare the configs that the modules themselves hold with the requested attention.

    Each attention module dispatches on its own config at every forward.
    """
    asked = loaded.job.spec.attn
    if asked is None:
        return
    wrong: dict[str, list[str]] = {}
    seen = 0
    for path, module in loaded.inventory.modules.items():
        used = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if used is None:
            continue
        seen += 1
        if used != asked:
            wrong.setdefault(str(used), []).append(path or "the model")
    for used, paths in wrong.items():
        yield Problem(CHECK, f"attention {asked} was requested, but {used} is used", tuple(paths))
    if not seen:
        yield Problem(CHECK, f"attention {asked} was requested, but the model does not say which it uses")
