"""``llm_benchmark``: pytest-benchmark's table, JSON and comparisons, of calls that are timed where the model lives.

pytest-benchmark asks a timer before and after each call. Here it is a clock of our own, which only the seconds measured
in the load's process move: what the call's way there and back takes is in no figure.
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
    """A timer that stands still but for :meth:`advance`."""

    # What pytest-benchmark names the timer by in its JSON.
    __name__ = "load_process"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


class Benchmark:
    """``llm_benchmark(function, *args)``: as ``llm.run``, over several rounds."""

    def __init__(self, llm: LLM, benchmark: Any, clock: Clock) -> None:
        self._load = llm._load
        self._benchmark = benchmark
        self._clock = clock

    def __call__(
        self, function: Callable[..., Any] | str, *args: Any, rounds: int = 5, warmup_rounds: int = 1, **kwargs: Any
    ) -> Any:
        """Call ``function(model, tokenizer, *args, **kwargs)`` there, and return what the last call returned."""
        __tracebackhide__ = True

        def call() -> Any:
            __tracebackhide__ = True
            value, seconds = self._load.timed_run(function, args, kwargs)
            self._clock.advance(seconds)
            return value

        return self._benchmark.pedantic(call, rounds=rounds, warmup_rounds=warmup_rounds)


def pytest_itemcollected(item: pytest.Item) -> None:
    if "llm_benchmark" not in getattr(item, "fixturenames", ()):
        return
    clock = item.stash[_CLOCK] = Clock()
    # pytest-benchmark reads the nearest marker only: what the user wrote goes into ours.
    users = item.get_closest_marker("benchmark")
    kwargs = dict(users.kwargs) if users is not None else {}
    item.add_marker(pytest.mark.benchmark(**{**kwargs, "timer": clock}), append=False)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    state = existing_state(config)
    if state is None:
        return
    from pytest_llmload.core.errors import MachineError

    try:
        machine_info["gpus"] = [gpu.name for gpu in state.device.gpus]
    except MachineError:
        machine_info["gpus"] = []  # the tests that need it say why


@pytest.fixture
def llm_benchmark(llm: LLM, benchmark: Any, request: pytest.FixtureRequest) -> Benchmark:
    """llm_benchmark(function, *args, rounds=5, warmup_rounds=1): llm.run for pytest-benchmark, timed in its process."""
    return Benchmark(llm, benchmark, request.node.stash[_CLOCK])
