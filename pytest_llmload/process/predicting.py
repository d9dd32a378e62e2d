"""A load predicted for GPUs that do not exist: the steps of a measured load, on fake tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LOADED, LoadResult
from pytest_llmload.prediction.devices import MODELS, PREDICTED
from pytest_llmload.process.check_calls import CheckCalls
from pytest_llmload.process.measurement import Measurement, new_result
from pytest_llmload.process.probe_calls import ProbeCalls
from pytest_llmload.worker.model.device import is_out_of_memory

if TYPE_CHECKING:
    from pytest_llmload.prediction.tracing import Tracing
    from pytest_llmload.strategies import Strategy
    from pytest_llmload.worker.model.loaded import Loaded

#: The CUDA release to report if the installed torch was built without CUDA.
_CUDA = "13.0"


def predict(job: Job, phase: Callable[[str], None]) -> LoadResult:
    """Return the GPU memory, in bytes, that a load would take on the job's device.

    Figures that cannot be traced are unavailable, with the reason. Out of memory on the device propagates, as it does
    in a measured load.
    """
    from pytest_llmload.prediction.tracing import Tracing

    # Without a group of figures kernels are not warmed up, which would leave nothing in the allocator anyway.
    job = dataclasses.replace(job, figures=())
    model = MODELS[job.device.key]
    tracing = Tracing(model, len(job.device.gpus))
    result = new_result(job)
    with contextlib.ExitStack() as entered:
        session = _Predicted(job, phase, result, tracing, entered)
        try:
            session.measure()
        except LoadFailed:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                session.fill()
                raise
            reason = tracing.reason or f"the load cannot be traced: {type(error).__name__}: {_line(error)}"
            tracing.reason = f"{reason} (at {tracing.record.last_line})"
            session.fill()
    return _as_predicted(result, tracing)


def not_here(job: Job, place: str) -> LoadResult:
    """Return the result of a load whose model is in other processes, which are not traced."""
    result = new_result(job)
    reason = f"strategy {job.spec.strategy!r} loads in processes of its own ({place}), which are not traced"
    result.unavailable = dict.fromkeys(PREDICTED, reason)
    return result


def _as_predicted(result: LoadResult, tracing: Tracing) -> LoadResult:
    """Reduce a result to the prediction: GPU memory, the reason for each missing figure, and the allocating lines."""
    result.metrics = {name: value for name, value in result.metrics.items() if name.startswith("gpu.")}
    # The trace of a torch release's CPU build stands for its GPU build.
    result.environment = {**result.environment, "torch": result.environment.get("torch", "").partition("+")[0]}
    if tracing.reason:
        # This includes libraries that wrap the Untraceable error in one of their own.
        result.outcome, result.problems = LOADED, []
    missing = [name for name in PREDICTED if name not in result.metrics]
    result.unavailable |= dict.fromkeys(missing, tracing.reason or "the load did not get that far")
    result.notes += [f"predicted as if {assumption}" for assumption in tracing.assumed]
    result.sites = {
        phase: [[row.site.operator, row.site.line, row.nbytes, row.count, row.at_peak] for row in rows]
        for phase, rows in tracing.record.tables().items()
    }
    return result


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


class _Predicted(Measurement):
    """Loads, runs the first forward and generates the workload."""

    def __init__(
        self,
        job: Job,
        phase: Callable[[str], None],
        result: LoadResult,
        tracing: Tracing,
        entered: contextlib.ExitStack,
    ) -> None:
        super().__init__(job, phase, result)
        self._tracing = tracing
        self._entered = entered

    def _new_checks(self, served_by: list[Strategy]) -> CheckCalls:
        return _NoChecks(self.job, self.result, served_by)

    def _import_own(self) -> None:
        from pytest_llmload.prediction.predicted_process import predicted_process
        from pytest_llmload.probes.gpu_memory import GpuMemory
        from pytest_llmload.probes.weights import Weights
        from pytest_llmload.worker.model import generation

        # The libraries were imported as on this machine; from here on the predicted GPUs exist.
        self._entered.enter_context(predicted_process(self._tracing, _CUDA))
        self.probes = ProbeCalls([GpuMemory(self.job), Weights(self.job)], self.result)
        generation.check_length(self.job)

    def _at(self, moment: str, *args: Any) -> None:
        self._tracing.record.moment(moment)
        super()._at(moment, *args)

    def _packages(self, loaded: Loaded) -> tuple[str, ...]:
        """Return none: quantised weights are recognised by values, which fake tensors do not have."""
        return ()

    def _finished(self, loaded: Loaded) -> None:
        pass

    def _looking(self, loaded: Loaded) -> Callable[[Any], None]:
        """Return the monitor of a measured load, which allocates some memory at each token."""
        from pytest_llmload.worker.model.logits_monitor import LogitsMonitor

        monitor = loaded.logits_monitor = LogitsMonitor(loaded.model)

        def look(logits: Any) -> None:
            self._tracing.token_follows(logits)
            monitor.look(logits)

        return look


class _NoChecks(CheckCalls):
    """Skips every check, since checks need real values."""

    def after_load(self, loaded: Loaded) -> None:
        pass

    def after_forward(self, loaded: Loaded) -> None:
        pass

    def after_figures(self, loaded: Loaded) -> None:
        pass

    def same_output(self, loaded: Loaded) -> None:
        pass

    def attempt(self, check: str, loaded: Loaded, call: Callable[[], Any]) -> Any:
        """Return the call's result; an exception ends the prediction, and is its reason."""
        return call()
