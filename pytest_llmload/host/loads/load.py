"""One shared load: its measurements, which stay fixed, and its process while tests still need it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pytest

from pytest_llmload.baselines.statistics import PROCESSES
from pytest_llmload.core import results
from pytest_llmload.core.errors import LoadError, LoadFailed, MachineError
from pytest_llmload.core.job import COUNTING, EVERYTHING, LOADING, RECORDING, TIMES, TIMES_ALONE, WITHOUT_TIMES, Scope
from pytest_llmload.core.results import ErrorInfo, Fault, LoadResult
from pytest_llmload.host.loads import calls, run_output
from pytest_llmload.host.loads.inline import InlineProcess
from pytest_llmload.host.loads.processes import Interrupted, LoadDied, LoadProcess

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.opened import Opened
    from pytest_llmload.system.protocol import Message

_Figure = TypeVar("_Figure")
#: The times that generating takes; they are measured only if a test reads them.
TIMED = frozenset({"ttft", "per_token"})
#: Exceptions that end a test from outside during its load: pytest-timeout's signal handler calls ``pytest.fail``.
_ENDED = (Interrupted, pytest.fail.Exception)
_NOT_TIMED = "no test of this load looks at times (latency_baseline, latency_budget, llm.timing)"


class Launcher(Protocol):
    """The interface that a load uses to start processes: :class:`pytest_llmload.host.loads.broker.Broker`."""

    @property
    def timeout(self) -> float: ...

    @property
    def predicts(self) -> bool: ...

    def measure(self, spec: LoadSpec, scope: Scope = ..., *, keep: bool = ...) -> tuple[LoadResult, Opened | None]: ...

    def reopen(self, spec: LoadSpec) -> Opened: ...

    def error(self, result: LoadResult) -> LoadError: ...

    def why_no_model(self, spec: LoadSpec) -> str: ...

    def runs_elsewhere(self, spec: LoadSpec) -> bool: ...

    def runs_already(self, spec: LoadSpec) -> bool: ...

    def measure_endpoint(
        self, spec: LoadSpec, scope: Scope, opened: Opened | None
    ) -> tuple[LoadResult, Opened | None]: ...


class Load:
    """One load of a run: its frozen measurements, and its process while tests still need it."""

    def __init__(self, launcher: Launcher, spec: LoadSpec) -> None:
        self.spec = spec
        self._launcher = launcher
        self._result: LoadResult | None = None
        self._machine_error: MachineError | None = None
        #: The error of the test that was ended while it loaded; the next test begins the load again.
        self._interruption: LoadError | None = None
        self._opened: Opened | None = None
        self._changed = False
        #: True if a test announced that it reads times, so that they are measured with the other metrics.
        self.times_wanted = False
        self._repeats: list[LoadResult] = []
        self._timed: list[LoadResult] = []
        self._loaded: list[LoadResult] = []
        self._worked: list[LoadResult] = []
        self._is_recorded = False
        self._told_faults: set[str] = set()

    @property
    def status(self) -> str:
        """Return how the load ended, or that it has not been loaded yet."""
        return "not loaded yet" if self._result is None else self._result.outcome

    @property
    def measured(self) -> bool:
        """Return true if the load has a result; it does not start the load."""
        return self._result is not None

    @property
    def result(self) -> LoadResult:
        """Return the measurements, which start at the first request. Raises MachineError, again for every test.

        Raises LoadTimeout if another plugin ends the test meanwhile (pytest-timeout), until that test is over.
        """
        if self._machine_error is not None:
            raise self._machine_error
        if self._interruption is not None:
            raise self._interruption
        if self._result is None:
            try:
                self._result, self._opened = self._launcher.measure(self.spec, self._scope, keep=True)
            except MachineError as error:
                self._machine_error = error
                raise
            except _ENDED as error:
                self._interruption = self._interrupted(error)
                raise self._interruption from None
            except LoadFailed as error:
                # The checkpoint itself is not a model: the load failed before it could start.
                info = ErrorInfo(message=str(error), phase="resolve")
                self._result = LoadResult(spec=self.spec.to_json(), outcome=results.FAILED, error=info)
            if not self.times_wanted and self._result.ok:
                absent = TIMED - self._result.samples.keys() - self._result.unavailable.keys()
                self._result.unavailable |= dict.fromkeys(absent, _NOT_TIMED)
        return self._result

    @property
    def _scope(self) -> Scope:
        return EVERYTHING if self.times_wanted else WITHOUT_TIMES

    def with_times(self) -> LoadResult:
        """Return the measurements with ``ttft`` and ``per_token``, if unannounced measured now in a separate process.

        Raises LoadError if that process does not load any more.
        """
        own = self.result
        if own.ok and not TIMED.intersection(own.samples):
            timed = self._again(TIMES_ALONE)
            for name in TIMED.intersection(timed.samples):
                own.samples[name], own.metrics[name] = timed.samples[name], timed.metrics[name]
                own.unavailable.pop(name, None)
        return own

    def untold_faults(self) -> list[Fault]:
        """Return the checks and probes that raised, each once in the life of the load; none if it was not measured."""
        measured = [result for result in (self._result, *self._repeats, *self._timed, *self._worked) if result]
        found = {fault.message: fault for result in measured for fault in result.faults}
        untold = [fault for message, fault in found.items() if message not in self._told_faults]
        self._told_faults |= found.keys()
        return untold

    @property
    def error(self) -> LoadError | None:
        """Return the error with which the tests of this load fail; None if the load is fine."""
        if self._interruption is not None:
            return self._interruption
        return None if self.result.ok else self._launcher.error(self.result)

    def repeats(self, count: int) -> list[LoadResult]:
        """Return ``count`` results of the same load, measured again in fresh processes, alone on the device.

        Each of them is measured once per run. A running endpoint is only asked again what it reports about itself.
        """
        scope = LOADING if self._launcher.runs_already(self.spec) else self._scope
        while len(self._repeats) < count:
            self._repeats.append(self._measured_again(scope))
        return self._repeats[:count]

    def timed(self, processes: int, loads: int, until: float) -> list[LoadResult]:
        """Return results of the same load, timed again in fresh processes.

        So many ``processes`` are timed, then further ones that only load, until there are ``loads``; or as many as
        start before ``until``, a moment of ``time.monotonic`` in seconds. ``until`` does not stop the processes that a
        judgement needs at least. Results of earlier calls count. Raises LoadError if one does not load any more.
        """
        while len(self._timed) < processes and (len(self._timed) < PROCESSES or time.monotonic() < until):
            self._timed.append(self._again(TIMES))
        timed = self._timed[:processes]
        only_loads = max(loads - len(timed), 0)
        while len(self._loaded) < only_loads and (
            len(timed) + len(self._loaded) < PROCESSES or time.monotonic() < until
        ):
            self._loaded.append(self._again(LOADING))
        return self._loaded[:only_loads] + timed

    @property
    def timed_results(self) -> list[LoadResult]:
        """Return the result of every process that was timed so far; the load's own while it is the only one."""
        return self._loaded + (self._timed or [self.result])

    def worked(self, count: int = 1) -> list[LoadResult]:
        """Return the load's measurements with the work counted, ``count`` times, each in a separate process.

        The first counts become the load's own. Raises LoadError as ``timed`` does.
        """
        work = [name for name, metric in self.result.table.items() if metric.section == "work"]
        if self.result.unavailable.keys() >= set(work):
            # A process cannot count it: the model does not generate, or it belongs to a server.
            return [self.result] * count
        while len(self._worked) < count:
            counted, own = self._again(COUNTING), self.result
            names = counted.in_section("work")
            with_work = dataclasses.replace(
                own,
                metrics={**own.metrics, **_only(names, counted.metrics)},
                unavailable={**own.unavailable, **_only(names, counted.unavailable)},
            )
            if not self._worked:
                own.metrics, own.unavailable = with_work.metrics, with_work.unavailable
            self._worked.append(with_work)
        return self._worked[:count]

    def record_allocations(self) -> None:
        """Load once more with every allocation recorded, and add the callers that allocate to the result; once per run.

        The measurements stay those of the first load. If the model is in different processes, nothing is recorded.
        """
        if self._is_recorded or self._launcher.runs_elsewhere(self.spec):
            return
        self._is_recorded = True
        try:
            self.result.allocations = self._again(RECORDING).allocations
        except (LoadError, MachineError) as error:
            self.result.notes.append(f"who allocated the memory is not known: {str(error).splitlines()[0]}")

    def _measured_again(self, scope: Scope) -> LoadResult:
        """Measure in a fresh process; an endpoint with the client that it already has, since the server stays."""
        if self._launcher.runs_already(self.spec):
            result, self._opened = self._launcher.measure_endpoint(self.spec, scope, self._opened)
            return result
        self.close()
        try:
            return self._launcher.measure(self.spec, scope)[0]
        except _ENDED as error:
            raise self._interrupted(error) from None

    def _again(self, scope: Scope) -> LoadResult:
        result = self._measured_again(scope)
        if not result.ok:
            raise self._launcher.error(result)
        return result

    def generate(self, text: str | Sequence[int], max_new_tokens: int) -> dict[str, Any]:
        """Return ``tokens``, ``text`` and ``count`` of a prompt's continuation; see :meth:`LLM.generate`."""
        __tracebackhide__ = True
        reply = self._ask({"kind": "generate", "text": text, "max_new_tokens": max_new_tokens})
        if reply["kind"] == "error":
            calls.raise_here(reply)
        return {name: reply[name] for name in ("tokens", "text", "count")}

    def run(self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function returns where the model is; see :meth:`LLM.run`."""
        __tracebackhide__ = True
        return self.timed_run(function, args, kwargs)[0]

    def timed_run(
        self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, float]:
        """Return the function's value, and the seconds that it took in the process that has the model."""
        __tracebackhide__ = True
        message = calls.encode(function, args, kwargs)
        process = self._serving()
        if (files := process.printed) is not None:
            message |= {"output": [str(path) for path in files], "levels": run_output.levels()}
        with run_output.shown(files):
            reply = self._request(process, message)
        self._changed |= reply["changed"]
        run_output.log(reply)
        if reply["kind"] != "error":
            run_output.warn(reply)
            return calls.decode(reply), reply["seconds"]
        # The function's exception counts, even if a filter turns an earlier warning of it into an error.
        with contextlib.suppress(Warning):
            run_output.warn(reply)
        calls.raise_here(reply)

    @property
    def model(self) -> Any:
        """Return the model itself. Raises RuntimeError unless it is in this process, and the load's error."""
        __tracebackhide__ = True
        if self.error is not None:
            raise self.error
        if reason := self._launcher.why_no_model(self.spec):
            raise RuntimeError(reason)
        if self._opened is None or not isinstance(self._opened.process, InlineProcess):
            raise RuntimeError(
                "the model lives in a process of its own: use llm.run(function), or --llm-isolation=inline to debug"
            )
        return self._opened.process.model

    def _ask(self, message: Message) -> Message:
        __tracebackhide__ = True
        return self._request(self._serving(), message)

    def _serving(self) -> LoadProcess | InlineProcess:
        """Return the process that has the model, loaded again if it has ended. Raises the load's error."""
        __tracebackhide__ = True
        if self.error is not None:
            raise self.error
        if self._launcher.predicts:
            pytest.skip("the load is predicted: there is no model to use")
        if self._opened is None or not self._opened.is_alive:
            self.close()
            try:
                self._opened, self._changed = self._launcher.reopen(self.spec), False
            except _ENDED as error:
                raise self._interrupted(error) from None
        return self._opened.process

    def _request(self, process: LoadProcess | InlineProcess, message: Message) -> Message:
        __tracebackhide__ = True
        try:
            return process.request(message, self._launcher.timeout)
        except _ENDED as error:
            self.close()
            raise self._interrupted(error) from None
        except LoadDied as death:
            self.close()
            # The measurements are complete and stay; the process that died served this test.
            result = LoadResult(spec=self.spec.to_json(), outcome=death.outcome, error=death.info)
            raise self._launcher.error(result) from None

    def _interrupted(self, error: BaseException) -> LoadError:
        """Return the error of a test that a different plugin ended during its load."""
        if isinstance(error, Interrupted):
            info = error.info
        else:
            info = ErrorInfo(message=f"ended before the load had begun: {error}", phase="start")
        return self._launcher.error(LoadResult(spec=self.spec.to_json(), outcome=results.TIMEOUT, error=info))

    def forget_interruption(self) -> None:
        """Load at the next request, which comes from a different test than the one that was ended."""
        self._interruption = None

    def forget_failure(self) -> bool:
        """Load again at the next request if the load failed. Return whether it had failed."""
        failed = self._machine_error is not None or (self._result is not None and not self._result.ok)
        if failed:
            self.close()
            self._result = self._machine_error = None
        return failed

    def after_test(self) -> None:
        """Close the model if the test changed it, so that other tests do not get it."""
        if self._changed:
            self.close()

    def close(self) -> None:
        """End the process, if there is one; the measurements stay."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _only(names: Set[str], figures: Mapping[str, _Figure]) -> dict[str, _Figure]:
    return {name: figures[name] for name in figures.keys() & names}
