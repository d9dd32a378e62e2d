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
    # The model inside a wrapper has the names of the checkpoint.
    inside = _inside(model)
    wrapper = None if inside is model else model
    loaded = Loaded(job=job, model=inside, wrapper=wrapper, given_tokenizer=tokenizer)
    _evaluate(loaded)
    return loaded


def _inside(model: Any) -> Any:
    """Return the model inside the module that ``torch.compile`` or data parallelism puts around it, else itself."""
    import torch

    # Imported where the user's code has compiled something.
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return _inside(model._orig_mod)
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        return _inside(model.module)
    return model


def _evaluate(loaded: Loaded) -> None:
    """Record which modules are in training mode, and set the model to evaluation mode for the measurement."""
    loaded.trained = tuple(name or "the model" for name, module in loaded.model.named_modules() if module.training)
    if loaded.trained:
        loaded.model.eval()
