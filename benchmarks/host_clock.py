"""A pytest plugin that says what the pytest process waited for, second by second; for ``overhead.py``.

    python -m pytest -p host_clock …                           (with this folder on PYTHONPATH)

Writes ``spent.json`` into the current folder: the seconds of each activity, none counted twice, so that they add up to
the run's; every activity with its begin; and the phases and GPU figures of each load.
"""

from __future__ import annotations

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pytest_llmload
from pytest_llmload.core.results import LoadResult
from pytest_llmload.host.loads.broker import Broker
from pytest_llmload.host.loads.model_files import Files
from pytest_llmload.host.loads.process_factory import ProcessFactory
from pytest_llmload.host.loads.processes import LoadProcess

#: What the pytest process does by itself: hooks, tests, verdicts, reports.
_REST = "pytest and tests"
#: Methods during which the pytest process waits, and what for.
_WAITS: tuple[tuple[type, str, str], ...] = (
    (Files, "checkpoint", "model's files"),
    (Files, "adapter", "model's files"),
    (Broker, "_take_spare", "prepared process"),
    (Broker, "_beside", "preparing the next process"),
    (Broker, "_lease", "lease of the GPU"),
    (ProcessFactory, "start", "start of a process"),
    (Broker, "close", "end of the run's processes"),
    (LoadProcess, "close", "end of a process"),
)


class Clock:
    """Exclusive seconds of nested activities."""

    def __init__(self) -> None:
        self._begin = self._since = time.perf_counter()
        self._stack = [_REST]
        self.seconds: dict[str, float] = defaultdict(float)
        #: Name, begin and seconds of each stretch.
        self.stretches: list[tuple[str, float, float]] = []

    def enter(self, name: str) -> None:
        """Begin an activity; the one before goes on after it."""
        self._charge()
        self._stack.append(name)

    def change(self, name: str) -> None:
        """End the current activity and begin another in its place."""
        self._charge()
        self._stack[-1] = name

    def leave(self) -> None:
        """End the current activity."""
        self._charge()
        self._stack.pop()

    def total(self) -> float:
        """Return the seconds since the clock was made."""
        self._charge()
        return self._since - self._begin

    def _charge(self) -> None:
        now = time.perf_counter()
        name = self._stack[-1]
        self.seconds[name] += now - self._since
        self.stretches.append((name, self._since - self._begin, now - self._since))
        self._since = now


_clock = Clock()
_loads: list[dict[str, Any]] = []


def _timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        _clock.enter(name)
        try:
            return real(*args, **kwargs)
        finally:
            _clock.leave()

    return call


def _requested(real: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Broker._request``, with each phase of the load as an activity of its own."""

    @functools.wraps(real)
    def call(self: Broker, process: object, job: object, entered: Callable[[str], None] | None = None) -> Any:
        def phase(name: str) -> None:
            _clock.change(f"load: {name}")
            if entered is not None:
                entered(name)

        _clock.enter("load: asked")
        try:
            return real(self, process, job, phase)
        finally:
            _clock.leave()

    return call


def pytest_configure(config: pytest.Config) -> None:
    """Put the clock around what the pytest process waits for."""
    for owner, method, name in _WAITS:
        setattr(owner, method, _timed(name, getattr(owner, method)))
    setattr(Broker, "_request", _requested(Broker._request))  # noqa: B010 - as for the methods above


def pytest_llmload_load_finished(result: LoadResult) -> None:
    """Keep the phases and figures of a load."""
    gpu = {name: value for name, value in result.metrics.items() if name.startswith("gpu.")}
    _loads.append({"phases": result.phases, "figures": gpu})


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Write what was found."""
    found = {
        "package": str(Path(pytest_llmload.__file__).parent),
        "run": _clock.total(),
        "seconds": _clock.seconds,
        "stretches": _clock.stretches,
        "loads": _loads,
    }
    Path("spent.json").write_text(json.dumps(found))
