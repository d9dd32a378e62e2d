"""What strategies exist, as pytest sees them: their declarations, read without importing torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmload.core.registry import BUILTIN_PROBES, BUILTIN_STRATEGIES

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec


class Strategies:
    """Built-in strategies and those that hooks register, by name; a name given twice is a UsageError."""

    def __init__(self, config: pytest.Config) -> None:
        self.targets: dict[str, str] = dict(BUILTIN_STRATEGIES)
        self.probes: tuple[str, ...] = BUILTIN_PROBES
        for registered in config.hook.pytest_llmload_strategies(config=config):
            for name, target in registered.items():
                if self.targets.setdefault(name, target) != target:
                    raise pytest.UsageError(f"strategy {name!r} is registered twice: {self.targets[name]} and {target}")
        for probes in config.hook.pytest_llmload_probes(config=config):
            self.probes += tuple(probes)
        self._declarations: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The declaration (class) of a strategy. Raises KeyError for an unknown name."""
        if name not in self._declarations:
            module, _, attribute = self.targets[name].partition(":")
            self._declarations[name] = getattr(importlib.import_module(module), attribute)
        return self._declarations[name]

    def __contains__(self, name: object) -> bool:
        return name in self.targets

    def names(self) -> list[str]:
        return list(self.targets)

    def of(self, spec: LoadSpec) -> list[Any]:
        """The strategies that take part in a load: its placement, dtype, quantisation and adapter."""
        names = [spec.strategy, spec.dtype, spec.quant if spec.quant != "none" else None]
        names += ["lora" if spec.adapter is not None else None]
        return [self[name] for name in names if name is not None]

    def missing_packages(self, spec: LoadSpec) -> list[str]:
        """Packages that a load needs and that are not installed, found without importing them."""
        from importlib.util import find_spec

        needed = ["torch", "transformers"]
        for strategy in self.of(spec):
            needed += strategy.needs(spec)
        return [name for name in dict.fromkeys(needed) if find_spec(name) is None]
