"""From a job to the strategies that serve it and the arguments they agree on."""

from __future__ import annotations

import json
from typing import Any

from pytest_llmload.core.job import Job
from pytest_llmload.core.registry import BUILTIN_STRATEGIES, resolve
from pytest_llmload.core.spec import CHECK_OPTIONS
from pytest_llmload.strategies.base import Strategy

_RANKS = "pytest_llmload.process.ranks.launcher:Ranks"


def strategies(job: Job) -> list[Strategy]:
    """The strategy of the placement first, then those of dtype, quantisation and adapter.

    Raises ValueError for a name that nobody registered.
    """
    spec = job.spec
    names = [spec.strategy, *([spec.dtype] if spec.dtype else []), *([spec.quant] if spec.quant != "none" else [])]
    names += ["lora"] if spec.adapter is not None else []
    known = {**BUILTIN_STRATEGIES, **job.strategies}
    for name in names:
        if name not in known:
            raise ValueError(f"no strategy is called {name!r}; known: {', '.join(sorted(known))}")
    return [resolve(known[name])() for name in names]


def elsewhere(job: Job) -> str:
    """``module:Class`` of what has the model in other processes; empty where it is loaded in this one."""
    places = (_RANKS if strategy.in_ranks else strategy.elsewhere for strategy in strategies(job))
    return next((place for place in places if place), "")


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
