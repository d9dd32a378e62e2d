"""The modules that the warm server imports, so that loads need not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_llmload.core.libraries import LIBRARY, PLACEMENT, is_installed

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.strategies import Strategies

#: The modules that every load of a model needs: libraries first, then those that serve and measure a load there.
BASE = (
    *LIBRARY,
    *PLACEMENT,
    "cloudpickle",
    "pytest_llmload.process.measurement",
    "pytest_llmload.process.measuring_modules",
)


def base() -> tuple[str, ...]:
    """Return the modules that every load needs: none without torch, where only a running endpoint can be measured."""
    return BASE if is_installed("torch") else ()


def own_modules(specs: Iterable[LoadSpec], model_types: Iterable[str], strategies: Strategies) -> list[str]:
    """Return the further modules of a run's loads; fixed before the first load, so that all start equally."""
    modules = []
    for model_type in model_types:
        modules += architecture(model_type)
    for spec in specs:
        for strategy in strategies.of(spec):
            modules.append(strategy.__module__)
            modules += [package for package in strategy.packages if package not in strategy.cold_packages]
    return list(dict.fromkeys(modules))


def architecture(model_type: str) -> list[str]:
    """Return the modules of transformers that a model of this type consists of."""
    package = model_type.replace("-", "_")
    return [f"transformers.models.{package}.{part}_{package}" for part in ("configuration", "modeling")]
