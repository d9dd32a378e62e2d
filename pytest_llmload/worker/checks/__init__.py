"""What every load must pass: one file per check."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pytest_llmload.core.results import Problem
from pytest_llmload.worker.checks import (
    adapter,
    attention,
    checkpoint_coverage,
    computed_buffers,
    config_fields,
    devices,
    dtype,
    eval_mode,
    finite,
    keys,
    offloaded,
    quantised,
    raw_weights,
    shards,
    tied,
    values,
)
from pytest_llmload.worker.model.loaded import Loaded

#: After the load, before any forward: a forward may repack weights.
AFTER_LOAD: tuple[Callable[[Loaded], Iterable[Problem]], ...] = (
    # First: what is wrong with an adapter explains what the others find below it.
    adapter.check,
    keys.check,
    checkpoint_coverage.check,
    devices.check,
    quantised.check,
    dtype.check,
    attention.check,
    eval_mode.check,
    config_fields.check,
    tied.check,
    values.check,
    computed_buffers.check,
    shards.check,
)
#: After the first forward, whose logits are still there.
AFTER_FORWARD: tuple[Callable[[Loaded], Iterable[Problem]], ...] = (finite.check, quantised.after_forward)
#: After the workload was generated and every figure taken: they read all weights, or what the logits were meanwhile.
AFTER_FIGURES: tuple[Callable[[Loaded], Iterable[Problem]], ...] = (
    finite.weights,
    finite.decoded,
    offloaded.check,
    raw_weights.check,
)


def check_name(check: Callable[[Loaded], Iterable[Problem]]) -> str:
    """Return the name of a check: that of its module, and of the function where the module has several."""
    module = check.__module__.rpartition(".")[2]
    return module if check.__name__ == "check" else f"{module}.{check.__name__}"
