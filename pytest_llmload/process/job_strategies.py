"""The strategies that carry out a job, and the arguments that they agree on."""

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
    """Return the placement's strategy, then those of dtype, quantisation and adapter.

    Raises ValueError if a name is neither built in nor registered.
    """
    return [_strategy(job, name)() for name in job.spec.facets()]


def _strategy(job: Job, name: str) -> type[Strategy]:
    if name in BUILTIN:
        return BUILTIN[name]
    schemes = strategies_of(registry.schemes().values())
    if name in schemes:
        return schemes[name]
    if name not in job.strategies:
        known = ", ".join(sorted((*BUILTIN, *schemes.keys() - BUILTIN.keys(), *job.strategies)))
        raise ValueError(f"unknown strategy {name!r}; use one of {known}")
    found: type[Strategy] = resolve(job.strategies[name])
    return found


def runs_in(job: Job) -> str:
    """Return which process has the model: ``HERE``, ``RANKS`` or ``SERVER``."""
    return next((strategy.runs_in for strategy in strategies(job) if strategy.runs_in != HERE), HERE)


def plan(job: Job) -> dict[str, float]:
    """Return the planner's figures of a load in bytes, by the metrics' names; empty if nothing can be predicted.

    Nothing can if the strategy places weights by rules of its own (tensor parallel, the user's loader …). Raises as
    :func:`pytest_llmload.worker.planning.planner.plan_load`.
    """
    from pytest_llmload.worker.planning import planner

    placement = _strategy(job, job.spec.strategy).placement
    return planner.plan(job, placement) if placement is not None else {}


def load_kwargs(job: Job, served_by: list[Strategy]) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained``: every strategy's part, the attention, and the user's own options.

    There are none for the user's own function, which may do what transformers cannot. Raises ValueError if two of them
    set different values of one argument.
    """
    if served_by[0].own_code:
        return {}
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
                raise ValueError(
                    f"{name}={value!r} by {source} contradicts {name}={merged[name]!r} by {origin[name]}; remove one"
                )
            merged[name], origin[name] = value, source
    # transformers 4 loads in float32 unless it is asked for the checkpoint's dtype; 5 uses that by default.
    merged.setdefault("dtype", "auto")
    return merged
