"""Select the loads of the ready-made suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from pytest_llmload.core.errors import MachineError
from pytest_llmload.host.settings import options

if TYPE_CHECKING:
    from pytest_llmload.host.run.state import State
    from pytest_llmload.strategies import Strategy


class SuiteLoads(NamedTuple):
    """The loads of the suite on one device."""

    #: Fields of a LoadSpec, one entry a load.
    fields: list[dict[str, Any]]
    #: Strategies that are not among them, and why.
    left_out: dict[str, str]


def suite_loads(state: State) -> SuiteLoads:
    """Return the strategies that fit this device without further input, or those of ``--llm-strategy``.

    With ``--llm-endpoint``, only its strategy fits: the model need not fit on this machine, or be there.

    Raises UsageError for an unknown name, and for a strategy that needs an option that is not given.
    """
    names, strategies = state.settings.strategies, state.strategies
    if unknown := [name for name in names if name not in strategies]:
        known = ", ".join(strategies)
        raise pytest.UsageError(f"{options.flag(state.config, 'strategy')}: unknown {unknown[0]!r}; use one of {known}")
    fields: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    loader = options.flag(state.config, "loader")
    for name in names or strategies:
        declaration = strategies[name]
        requested = bool(names) or (declaration.takes_endpoint and state.settings.endpoint is not None)
        if not requested and (reason := _why_not(declaration, state)):
            left_out[name] = reason
        elif not declaration.own_code:
            fields += [dict(each) for each in (declaration.fields, *declaration.also)]
        elif state.settings.loader is not None:
            fields.append({**declaration.fields, "target": state.settings.loader})
        elif requested:
            raise pytest.UsageError(f"strategy {name!r} needs {loader}")
        else:
            left_out[name] = f"only with {loader}"
    return SuiteLoads(fields, left_out)


def _why_not(declaration: type[Strategy], state: State) -> str:
    if state.settings.endpoint is not None:
        endpoint, strategy = (options.flag(state.config, name) for name in ("endpoint", "strategy"))
        return f"with {endpoint} only if {strategy} names it"
    try:
        return declaration.why_not_by_default(state.device)
    except MachineError as error:
        return str(error)
