"""Find stale baselines: those of this run's models and devices that are not used by any test of the whole suite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmload.core.errors import BaselineError, MachineError
from pytest_llmload.host.loads.jobs import ENDPOINT
from pytest_llmload.host.run import partial_runs

if TYPE_CHECKING:
    from pytest_llmload.baselines.store import Store
    from pytest_llmload.host.run.log import RunLog
    from pytest_llmload.host.run.state import State


def stale_baselines(state: State) -> list[Path]:
    """Return the stale baseline files; none if this run left tests out."""
    if not state.log.collected or state.log.tests_left_out or state.settings.predict:
        return []
    try:
        devices = _devices(state)
    except MachineError:
        return []
    models = {model.name for model in state.models}
    found = [
        entry.path
        for entry in state.store.entries()
        if entry.model in models and entry.device in devices and not _is_used(entry.path, state.store, state.log)
    ]
    return [] if found and partial_runs.narrowed(state.config) else found


def _devices(state: State) -> set[str]:
    """Return the devices that this run's loads could be on. Raises MachineError if the device is in doubt."""
    key = state.device.key
    counts = range(2, len(state.device.gpus) + 1)
    # The model of an endpoint can be loaded again only by a run that names the endpoint.
    return {key, *(f"{key}-x{count}" for count in counts), *([ENDPOINT] if state.settings.endpoint else [])}


def _is_used(path: Path, store: Store, log: RunLog) -> bool:
    """Return whether a test uses a baseline, or may use it in a run with other options.

    Such is a baseline of the ready-made suite in a run without the suite, and one of a strategy that the suite loads
    only on request.
    """
    if path in log.used_baselines:
        return True
    try:
        baseline = store.read(path)
    except BaselineError:
        return False
    if baseline is None:
        return False
    strategies = {baseline.spec.get(name) for name in ("strategy", "dtype", "quant")}
    return (baseline.suite and not log.suite_collected) or bool(strategies & log.left_out.keys())
