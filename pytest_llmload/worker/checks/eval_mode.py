"""The model is in evaluation mode: in training mode, dropout takes out activations at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import counted
from pytest_llmload.worker.model.loaded import Loaded

CHECK = "mode"


def check(loaded: Loaded) -> Iterator[Problem]:
    """Name the modules that the load left in training mode, and say what that does in them."""
    if not loaded.trained:
        return
    random = tuple(path for path in loaded.trained if path in loaded.inventory.modules and _drops(loaded, path))
    by_user = loaded.own_code
    where = "the loader returned the model" if by_user else "the library left the model"
    if random:
        remedy = ": call model.eval() in it" if by_user else ""
        yield Problem(
            CHECK,
            f"{where} in training mode, in which {counted(len(random), 'module drops', 'modules drop')} activations at "
            f"random{remedy}",
            random,
        )
    else:
        loaded.notes.append(f"{where} in training mode; it was measured in evaluation mode")


def _drops(loaded: Loaded, path: str) -> bool:
    """Return whether a module drops values.

    It is a dropout of torch's, or hands its own share to a function (``attention_dropout = 0.1``).
    """
    module = loaded.inventory.modules[path]
    if "Dropout" in type(module).__name__:
        return _is_share(getattr(module, "p", 0.0))
    return any(_is_share(value) for name, value in vars(module).items() if "drop" in name and not name.startswith("_"))


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and value > 0
