"""The strategies of a run, as pytest sees them: their declarations, read without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_llmload.core.libraries import is_installed
from pytest_llmload.core.references import resolve
from pytest_llmload.core.spec import SINGLE
from pytest_llmload.quantisation.registry import Methods
from pytest_llmload.strategies.builtin import BUILTIN
from pytest_llmload.strategies.quantised import strategies_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.quantisation import Scheme
    from pytest_llmload.strategies import Strategy


class Strategies:
    """Built-in strategies and those that hooks register, by name. Raises UsageError if a name is given twice."""

    def __init__(self, config: pytest.Config) -> None:
        #: Name -> ``module:Class`` of those that hooks register.
        self.registered: dict[str, str] = {}
        for registered in config.hook.pytest_llmload_strategies(config=config):
            for name, target in registered.items():
                if name in BUILTIN:
                    raise pytest.UsageError(f"strategy {name!r} is built in; register {target} under a different name")
                if self.registered.setdefault(name, target) != target:
                    raise pytest.UsageError(
                        f"strategy {name!r} is registered twice: {self.registered[name]} and {target}"
                    )
        #: ``module:Class`` of each quantisation method that hooks register.
        self.methods: tuple[str, ...] = tuple(
            method for methods in config.hook.pytest_llmload_quantisation(config=config) for method in methods
        )
        try:
            found = Methods(self.methods).schemes
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        #: The names that ``quant(...)`` accepts in addition to ``none``: schemes of the built-in methods and of those.
        self.schemes: dict[str, Scheme] = {name: scheme for name, (scheme, _) in found.items()}
        self._declarations: dict[str, type[Strategy]] = {**BUILTIN, **strategies_of(found.values())}

    def __getitem__(self, name: str) -> type[Strategy]:
        """Return the declaration of a strategy. Raises KeyError for an unknown name."""
        if name not in self._declarations:
            self._declarations[name] = resolve(self.registered[name])
        return self._declarations[name]

    def __contains__(self, name: object) -> bool:
        return name in self._declarations or name in self.registered

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._declarations, *self.registered]))

    @property
    def default(self) -> str:
        """Return the placement of a load whose test does not name one."""
        return SINGLE

    def of_own_code(self) -> str:
        """Return the name of the strategy that ``target=`` and ``--llm-loader`` stand for."""
        return next(name for name in self if self[name].own_code)

    def of_endpoint(self) -> str:
        """Return the name of the strategy that ``--llm-endpoint`` stands for."""
        return next(name for name in self if self[name].takes_endpoint)

    def heeded(self, scheme: str) -> tuple[str, ...]:
        """Return the options of ``quant`` that a scheme heeds."""
        found = self.schemes.get(scheme)
        return found.options if found is not None else ()

    def of(self, spec: LoadSpec) -> list[type[Strategy]]:
        """Return the strategies that take part in a load: of its placement, dtype, quantisation and adapter."""
        return [self[name] for name in spec.facets()]

    def missing_client_packages(self, spec: LoadSpec) -> list[str]:
        """Return the packages that a running endpoint's client needs and that are not installed."""
        needed = [name for strategy in self.of(spec) for name in strategy.client_packages]
        return [name for name in needed if not is_installed(name)]

    def missing_packages(self, spec: LoadSpec) -> list[str]:
        """Return the packages that a load needs and that are not installed, found without importing them."""
        needed = ["torch", "transformers"]
        for strategy in self.of(spec):
            needed += strategy.needs(spec)
        return [name for name in dict.fromkeys(needed) if not is_installed(name)]
