"""The model that a strategy or a user's loader returned, made ready to be measured."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.job import Job

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


def as_loaded(job: Job, given: Any) -> Loaded:
    """Return as a Loaded what a strategy or a user's loader returned. Raises TypeError if it is not a model."""
    from pytest_llmload.worker.model.loaded import Loaded

    if isinstance(given, Loaded):
        _evaluate(given)
        return given
    model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not hasattr(model, "named_modules"):
        raise TypeError(f"the loader returned {type(given).__name__}: return a model or (model, tokenizer)")
    compiled = model if _is_compiled(model) else None
    # The model inside has the names of the checkpoint.
    model = model if compiled is None else compiled._orig_mod
    loaded = Loaded(job=job, model=model, compiled=compiled, given_tokenizer=tokenizer)
    _evaluate(loaded)
    return loaded


def _is_compiled(model: Any) -> bool:
    """Return whether ``torch.compile`` was called on the model, which puts a module of its own around it."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def _evaluate(loaded: Loaded) -> None:
    """Record which modules are in training mode, and set the model to evaluation mode for the measurement."""
    loaded.trained = tuple(name or "the model" for name, module in loaded.model.named_modules() if module.training)
    if loaded.trained:
        loaded.model.eval()
