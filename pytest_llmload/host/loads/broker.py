"""The broker opens loads one after the other: files, a lease on the GPUs, a process, the measurement, the end.

Tests stay ordinary pytest items; only the load leaves pytest's process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmload.core import results
from pytest_llmload.core.errors import (
    MACHINE_ERRORS,
    LoadCrashed,
    LoadError,
    LoadFailed,
    LoadOutOfMemory,
    LoadTimeout,
    MachineError,
    StrategyNotApplied,
)
from pytest_llmload.core.job import EVERYTHING, HERE, SERVING, Checkpoint, Device, Job, Scope
from pytest_llmload.core.results import ErrorInfo, LoadResult
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.base_revision import BaseRevision
from pytest_llmload.host.loads.expected_loads import ExpectedLoads
from pytest_llmload.host.loads.gpu_leases import Lease, lease
from pytest_llmload.host.loads.inline import InlineProcess
from pytest_llmload.host.loads.jobs import Jobs
from pytest_llmload.host.loads.model_files import Files
from pytest_llmload.host.loads.opened import Opened
from pytest_llmload.host.loads.preloaded_modules import own_modules
from pytest_llmload.host.loads.process_end import ProcessEnd
from pytest_llmload.host.loads.process_factory import ProcessFactory
from pytest_llmload.host.loads.processes import LoadDied, LoadProcess
from pytest_llmload.host.loads.progress import Display, Watch
from pytest_llmload.host.loads.spare_policy import SparePolicy
from pytest_llmload.host.loads.spares import Spares
from pytest_llmload.system.scratch import LOAD, remove_abandoned

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.strategies import Strategies
    from pytest_llmload.host.settings.probes import OwnProbes
    from pytest_llmload.host.settings.settings import Settings

_PLAN_TIMEOUT = 300.0
#: Outcome of a load -> the error of its tests.
ERRORS: dict[str, type[LoadError]] = {
    results.OUT_OF_MEMORY: LoadOutOfMemory,
    results.CRASHED: LoadCrashed,
    results.TIMEOUT: LoadTimeout,
    results.FAILED: LoadFailed,
    results.NOT_APPLIED: StrategyNotApplied,
}


class Broker:
    """Loads models for tests, at most one at a time: a load that needs the device closes the one that holds it."""

    def __init__(
        self,
        settings: Settings,
        strategies: Strategies,
        probes: OwnProbes,
        device: Callable[[], Device],
        finished: Callable[[LoadResult], None],
        describe: Callable[[LoadResult], str],
        cwd: Path,
        display: Callable[[], Display],
    ) -> None:
        self._display = display
        self._settings = settings
        self._strategies = strategies
        self._device = device
        self._finished = finished
        self.describe = describe
        #: Models that were handed out and may not be closed yet.
        self._opened: list[Opened] = []
        self._factory = ProcessFactory(settings.inline, self._imports, self._gpu_answers, self._end_loads)
        self._files = Files(settings, self._factory.start_for_files, display)
        self._jobs = Jobs(settings, strategies, probes, self._files, device, cwd)
        self._plans: dict[LoadSpec, dict[str, float]] = {}
        self._spares = Spares()
        #: The driver's library, which takes longer to start than to answer, from the first lease of GPUs to the end.
        self._driver: contextlib.ExitStack | None = None
        self._process_end = ProcessEnd()
        #: The server imports what all of these need before the first load; processes are prepared for the next of them.
        self.expected = ExpectedLoads()
        self._spare_policy = SparePolicy(
            self.expected,
            device,
            predicts=self.predicts,
            runs_elsewhere=self.runs_elsewhere,
            gpus_needed=self.gpus_needed,
            forks=self._factory.forks,
        )

    @property
    def cold_reason(self) -> str | None:
        """Return why loads start with exec although they could fork; None while they fork."""
        return self._factory.cold_reason

    def why_no_model(self, spec: LoadSpec) -> str:
        """Return why tests cannot have the model itself; empty if they can."""
        return str(self._strategies[spec.strategy].no_model)

    def runs_elsewhere(self, spec: LoadSpec) -> bool:
        """Return whether the model is in different processes from the one that serves the session."""
        return bool(self._strategies[spec.strategy].runs_in != HERE)

    @property
    def predicts(self) -> bool:
        """Return True if loads are traced for a device that is not here; tests then have no model to use."""
        return self._settings.predict is not None

    @property
    def timeout(self) -> float:
        """Return the seconds after which a load's process is ended."""
        return self._settings.timeout

    def device(self) -> Device:
        """Return the device of this run. Raises MachineError if it cannot be used."""
        return self._device()

    def checkpoint(self, model: str) -> Checkpoint:
        """Return a model's files. Raises MachineError (network, disk) or LoadFailed (the files are not a model)."""
        return self._files.checkpoint(model)

    def runs_already(self, spec: LoadSpec) -> bool:
        """Return whether a load is that of ``--llm-endpoint``, which needs neither GPUs nor files of this machine."""
        return self._jobs.runs_already(spec)

    def gpus_needed(self, spec: LoadSpec) -> int:
        """Return how many GPUs of this machine a load needs. Raises MachineError if its ranks do not divide."""
        return self._jobs.gpus_needed(spec)

    def plan(self, spec: LoadSpec) -> dict[str, float]:
        """Return the planner's figures in bytes, from the meta device. Raises MachineError if planning fails."""
        if spec not in self._plans:
            job = self._jobs.job(spec, SERVING)
            process = self._factory.start(spec)
            try:
                reply = process.request({"kind": "plan", "job": job.to_json()}, _PLAN_TIMEOUT)
            except LoadDied as death:
                raise MachineError(f"planning {spec.id}: {death}\n{death.info.log}") from None
            finally:
                process.close()
            if reply["kind"] == "error":
                own = MACHINE_ERRORS.get(reply["outcome"], MachineError)
                raise own(f"planning {spec.id}: {ErrorInfo(**reply['error'])}")
            self._plans[spec] = reply["plan"]
        return self._plans[spec]

    def _lease(self, spec: LoadSpec) -> Lease:
        """Return GPUs for a load, after every load of this run has given its own back.

        A load that is used again reopens. Raises MachineError if the GPUs are not free in time.
        """
        self._close_opened()
        self._process_end.wait()
        if self.predicts:
            return Lease(self.device().gpus[: self.gpus_needed(spec)])
        device = self._jobs.device(spec)
        if device.kind == "cuda" and self._driver is None:
            self._driver = contextlib.ExitStack()
            self._driver.enter_context(hardware.nvml())
        return lease(
            device,
            self.gpus_needed(spec),
            wait_foreign=self._settings.wait_gpu,
            wait_lock=self._settings.timeout,
        )

    def _end_loads(self) -> None:
        """End every load. A load that is used again reopens."""
        self._discard_spares()
        self._close_opened()
        self._process_end.wait()

    def _discard_spares(self) -> None:
        """End the spares, and before them the process that still ends on their GPUs, which they hold the locks of."""
        self._process_end.wait()
        self._spares.discard()

    def _close_opened(self) -> None:
        for opened in self._opened:
            opened.close()
        self._opened = []

    def _end(self, process: LoadProcess | InlineProcess, held: Lease) -> None:
        self._process_end.end(process, held, next_is_ready=bool(self._spares))

    def _imports(self, spec: LoadSpec) -> list[str]:
        """Return the modules that this run's loads need, including the first load, which is ``spec``."""
        specs = [each for each in (*self.expected.specs, spec) if not self.runs_already(each)]
        # Which modules a model needs is known from its config; one that is not to be had fails its own tests.
        checkpoints = self._files.available(dict.fromkeys(each.model for each in specs))
        return own_modules(specs, [checkpoint.model_type for checkpoint in checkpoints], self._strategies)

    def _gpu_answers(self) -> dict[str, object] | None:
        """Return the server's answers to libraries that ask for a GPU while they are imported; None on a CPU.

        If the device is in doubt, each load that needs one reports it.
        """
        if self.predicts:
            return None
        try:
            device = self.device()
        except MachineError:
            return None
        if device.kind != "cuda":
            return None
        return {"count": len(device.gpus), "capability": device.gpus[0].capability}

    def close(self) -> None:
        """End every process; remove the logs and the files that killed loads have left on disk."""
        self._factory.close()
        remove_abandoned(LOAD)
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def measure(
        self, spec: LoadSpec, scope: Scope = EVERYTHING, *, keep: bool = False
    ) -> tuple[LoadResult, Opened | None]:
        """Load once in a fresh process and measure the metrics of ``scope``.

        Returns the result, and the model if it is to be kept and there is one. Raises MachineError, and LoadFailed if
        the checkpoint is not a model; every other outcome is returned as a result.
        """
        self._jobs.checkpoint(spec)
        self._files.adapter(spec)
        result, opened = self._open(spec, scope, keep=keep)
        if scope.checks:
            self._finished(result)
        return result, opened

    def measure_endpoint(self, spec: LoadSpec, scope: Scope, opened: Opened | None) -> tuple[LoadResult, Opened | None]:
        """Measure a running endpoint with its client ``opened``, or with a new client if that one has ended.

        Returns the result and the client. Raises MachineError.
        """
        if opened is None or not opened.is_alive:
            return self.measure(spec, scope, keep=True)
        result = self._request(opened.process, self._jobs.job(spec, scope))
        if scope.checks:
            self._finished(result)
        return result, opened

    def predict_at(self, spec: LoadSpec, root: Path, revision: str) -> LoadResult:
        """Return the prediction for a load with the user's code of a git revision. Raises MachineError."""
        base = BaseRevision(root, revision)
        job = self._jobs.job(spec, EVERYTHING)
        there = dataclasses.replace(
            job, sys_path=tuple(base.path(path) for path in job.sys_path), cwd=base.path(job.cwd)
        )
        process = self._factory.start_elsewhere(spec, base.variables(job.sys_path))
        try:
            return self._request(process, there)
        finally:
            process.close()
            base.close()

    def reopen(self, spec: LoadSpec) -> Opened:
        """Load again only to serve tests. Raises LoadError if that does not end in a model, and MachineError."""
        result, opened = self._open(spec, SERVING, keep=True)
        if opened is None:
            raise self.error(result)
        return opened

    def _open(self, spec: LoadSpec, scope: Scope, *, keep: bool) -> tuple[LoadResult, Opened | None]:
        """Load in a fresh process, which ends unless it is to be kept and has a model."""
        process: LoadProcess | InlineProcess | None
        process, held = self._take_spare(spec, scope) or (None, self._lease(spec))
        opened = None
        try:
            process = process or self._factory.start(spec)
            job = self._jobs.job(spec, scope, held)
            if scope.measure and scope.checks:
                self.expected.measured(spec)
            result = self._request(process, job, partial(self._beside, process, job, scope, held))
            if keep and result.ok and not self.predicts:
                opened = Opened(process, held, partial(self._end, process, held))
                self._opened.append(opened)
            return result, opened
        finally:
            if opened is None and process is not None:
                self._end(process, held)
            elif opened is None:
                held.release()

    def _take_spare(self, spec: LoadSpec, scope: Scope) -> tuple[LoadProcess, Lease] | None:
        """Return the process that was prepared for this load, and its GPUs, after every other load has ended."""
        expected = self._spares.next_job
        if expected is None:
            return None
        self._close_opened()
        gpus = expected.device.gpus
        own = self._spares.pids | self._process_end.pids
        if any(hardware.holders(gpu, own) for gpu in gpus):
            # A foreign process uses the GPU by now: the lease waits for it, or names it.
            self._discard_spares()
            return None
        job = self._jobs.job(spec, scope, Lease(gpus))
        if job != expected:
            self._discard_spares()
        return self._spares.take(job)

    def _beside(self, process: LoadProcess | InlineProcess, job: Job, scope: Scope, held: Lease, phase: str) -> None:
        """Prepare a process for the load that probably follows the one that is measured, if there is room for it."""
        if not isinstance(process, LoadProcess):
            return
        spec = self._spare_policy.next_load(phase, process.pid, job, scope, held.gpus, self._spares.specs)
        if spec is not None:
            self._process_end.wait()
            self._spares.make(self._jobs.job(spec, scope, held), held.descriptors, self._factory.fork_spare)

    def _request(
        self, process: LoadProcess | InlineProcess, job: Job, entered: Callable[[str], None] | None = None
    ) -> LoadResult:
        """Have a process load, and call ``entered`` with each phase that it enters."""
        try:
            with Watch(self._display(), job.spec.id, job.checkpoint.bytes, process.pid) as watch:
                reply = process.request({"kind": "load", "job": job.to_json()}, self._settings.timeout, entered, watch)
        except LoadDied as death:
            return LoadResult(spec=job.spec.to_json(), outcome=death.outcome, error=death.info)
        if reply["kind"] == "error":
            info = ErrorInfo(**reply["error"])
            info.log = process.tail()
            if reply["outcome"] in MACHINE_ERRORS:
                raise MACHINE_ERRORS[reply["outcome"]](info.message)
            if "result" not in reply:
                return LoadResult(spec=job.spec.to_json(), outcome=reply["outcome"], error=info)
            # What was seen until then.
            return dataclasses.replace(LoadResult.from_json(reply["result"]), outcome=reply["outcome"], error=info)
        return LoadResult.from_json(reply["result"])

    def error(self, result: LoadResult) -> LoadError:
        """Return the exception of a result that is not a loaded model."""
        return ERRORS[result.outcome](self.describe(result), result)
