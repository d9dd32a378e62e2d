"""From a job to the strategies that serve it and the arguments they agree on."""

from __future__ import annotations

import json
from typing import Any

from pytest_llmload.core.job import HERE, Job
from pytest_llmload.core.references import resolve
from pytest_llmload.core.spec import CHECK_OPTIONS
from pytest_llmload.quantisation import registry
from pytest_llmload.strategies import Strategy
from pytest_llmload.strategies.builtin import BUILTIN
from pytest_llmload.strategies.quantised import strategies_of


def strategies(job: Job) -> list[Strategy]:
    """Return the strategy of the placement, then those of dtype, quantisation and adapter.

    Raises ValueError for a name that is neither built in nor registered.
    """
    return [_strategy(job, name)() for name in job.spec.facets()]


def _strategy(job: Job, name: str) -> type[Strategy]:
    if name in BUILTIN:
        return BUILTIN[name]
    registry.use(job.methods)
    schemes = strategies_of(registry.schemes().values())
    if name in schemes:
        return schemes[name]
    if name not in job.strategies:
        known = ", ".join(sorted((*BUILTIN, *schemes.keys() - BUILTIN.keys(), *job.strategies)))
        raise ValueError(f"no strategy is called {name!r}; known: {known}")
    found: type[Strategy] = resolve(job.strategies[name])
    return found


def runs_in(job: Job) -> str:
    """Return which process has the model: ``HERE``, ``RANKS`` or ``SERVER``."""
    return next((strategy.runs_in for strategy in strategies(job) if strategy.runs_in != HERE), HERE)


def load_kwargs(job: Job, served_by: list[Strategy]) -> dict[str, Any]:
    """What ``from_pretrained`` is called with: every strategy's part, the attention, and the user's own options.

    Raises ValueError where two of them want different values of one argument.
    """
    own = {option for strategy in served_by for option in strategy.options} | set(CHECK_OPTIONS)
    options = {name: json.loads(value) for name, value in job.spec.options if name not in own}
    parts = [(f"strategy {strategy.name!r}", strategy.load_kwargs(job)) for strategy in served_by]
    parts.append(("the test's own options", options))
    if job.spec.attn:
        parts.append(("marker attn", {"attn_implementation": job.spec.attn}))
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, part in parts:
        for name, value in part.items():
            if name in merged and merged[name] != value:
                raise ValueError(f"{source} wants {name}={value!r}, but {origin[name]} wants {name}={merged[name]!r}")
            merged[name], origin[name] = value, source
    # transformers 4 loads in float32 unless told to do as the checkpoint says; 5 does so by default.
    merged.setdefault("dtype", "auto")
    return merged
