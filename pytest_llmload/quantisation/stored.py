"""Find a module's quantised weights, independent of the method that keeps them."""

from __future__ import annotations

from typing import Any

from pytest_llmload.quantisation.base import Stored
from pytest_llmload.quantisation.registry import methods


def stored_weights(module: Any) -> list[Stored]:
    """Return the quantised weights that a module holds itself, as the first method that knows the module reads them."""
    return next((found for method in methods() if (found := list(method.read(module)))), [])


def packages_in(model: Any) -> tuple[str, ...]:
    """Return the packages of the methods that hold weights of a model, also if its config names none."""
    own = (next((method for method in methods() if any(method.read(module))), None) for module in model.modules())
    return tuple(dict.fromkeys(package for method in own if method is not None for package in method.packages))
