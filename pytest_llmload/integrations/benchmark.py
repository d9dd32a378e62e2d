"""``llm_benchmark``: pytest-benchmark's table, JSON and comparisons for calls that are timed in the load's process.

pytest-benchmark reads a timer before and after each call. The timer here is a clock that only advances by the seconds
measured in the load's process, so the time to reach that process and return is not part of any figure. pytest-codspeed,
which replaces pytest-benchmark under ``--codspeed``, takes no timer: that time is part of its figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmload.host.run.stash import existing_state

if TYPE_CHECKING:
    from pytest_llmload.host.loads.llm import LLM

_CLOCK = pytest.StashKey["Clock"]()


class Clock:
    """A timer that only :meth:`advance` moves."""

    # The name of the timer in pytest-benchmark's JSON.
    __name__ = "load_process"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the timer forward."""
        self._now += seconds


class Benchmark:
    """Callable of the fixture ``llm_benchmark``: like ``llm.run``, over several rounds."""

    def __init__(self, llm: LLM, benchmark: Any, clock: Clock) -> None:
        self._load = llm._load
        self._benchmark = benchmark
        self._clock = clock

    def __call__(
        self, function: Callable[..., Any] | str, *args: Any, rounds: int = 5, warmup_rounds: int = 1, **kwargs: Any
    ) -> Any:
        """Call ``function(model, tokenizer, *args, **kwargs)`` in the load's process; return the last call's value."""
        __tracebackhide__ = True

        def call() -> Any:
            __tracebackhide__ = True
            value, seconds = self._load.timed_run(function, args, kwargs)
            self._clock.advance(seconds)
            return value

        return self._benchmark.pedantic(call, rounds=rounds, warmup_rounds=warmup_rounds)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give the tests that use ``llm_benchmark`` a timer of the load's process.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_itemcollected
    """
    if "llm_benchmark" not in getattr(item, "fixturenames", ()):
        return
    clock = item.stash[_CLOCK] = Clock()
    codspeed = item.config.pluginmanager.get_plugin("codspeed_plugin")
    if codspeed is not None and codspeed.is_codspeed_enabled:
        # It refuses a marker with a timer.
        return
    # pytest-benchmark reads only the nearest marker, so this plugin's marker takes over the user's arguments.
    users = item.get_closest_marker("benchmark")
    kwargs = dict(users.kwargs) if users is not None else {}
    item.add_marker(pytest.mark.benchmark(**{**kwargs, "timer": clock}), append=False)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add the run's GPUs to the machine in pytest-benchmark's JSON.

    https://pytest-benchmark.readthedocs.io/en/latest/hooks.html
    """
    state = existing_state(config)
    if state is None:
        return
    from pytest_llmload.core.errors import MachineError

    try:
        machine_info["gpus"] = [gpu.name for gpu in state.device.gpus]
    except MachineError:
        machine_info["gpus"] = []  # tests that need the device report the error


@pytest.fixture
def llm_benchmark(llm: LLM, benchmark: Any, request: pytest.FixtureRequest) -> Benchmark:
    """llm_benchmark(function, *args, rounds=5, warmup_rounds=1): llm.run for pytest-benchmark, timed in its process."""
    return Benchmark(llm, benchmark, request.node.stash[_CLOCK])
