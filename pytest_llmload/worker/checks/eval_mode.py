"""The model is in evaluation mode: in training mode, dropout takes out activations at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "mode"


def check(loaded: Loaded) -> Iterator[Problem]:
    """Of a user's own loader: which modules it left in training mode, and what that does in them."""
    if not loaded.trained:
        return
    random = tuple(path for path in loaded.trained if path in loaded.inventory.modules and _drops(loaded, path))
    if random:
        yield Problem(
            CHECK,
            f"the loader returned the model in training mode, in which {len(random)} modules drop activations at "
            "random: call model.eval() in it",
            random,
        )
    else:
        loaded.notes.append("the loader returned the model in training mode; it was measured in evaluation mode")


def _drops(loaded: Loaded, path: str) -> bool:
    """A dropout of torch's, or a module that hands its own share to a function (``attention_dropout = 0.1``)."""
    module = loaded.inventory.modules[path]
    if "Dropout" in type(module).__name__:
        return _is_share(getattr(module, "p", 0.0))
    return any(_is_share(value) for name, value in vars(module).items() if "drop" in name and not name.startswith("_"))


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and value > 0
