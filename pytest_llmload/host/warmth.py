"""What the warm server imports, so that no load has to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.strategies import Strategies

#: Libraries first, then what they import only when the first model is loaded or generates.
_BASE = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors.torch",
    "transformers.generation.utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.accelerate",
    "cloudpickle",
    "pytest_llmload.worker.measure",
)


def warm_modules(specs: Iterable[LoadSpec], model_types: Iterable[str], strategies: Strategies) -> list[str]:
    """The imports of a run's loads; fixed before the first load, so that every load starts from the same place."""
    modules = list(_BASE)
    for model_type in model_types:
        package = model_type.replace("-", "_")
        modules += [f"transformers.models.{package}.{part}_{package}" for part in ("configuration", "modeling")]
    for spec in specs:
        for strategy in strategies.of(spec):
            modules += [package for package in strategy.packages if package not in strategy.cold_packages]
    return list(dict.fromkeys(modules))
