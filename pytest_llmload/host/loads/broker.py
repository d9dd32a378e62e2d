"""The broker starts the processes of loads, with everything that they need before they can start.

Tests stay ordinary pytest items; only the load leaves pytest's process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
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
from pytest_llmload.core.job import (
    EVERYTHING,
    HERE,
    RANKS,
    SERVING,
    UNCONTROLLED,
    WITHOUT_TIMES,
    Checkpoint,
    Device,
    Job,
    Scope,
)
from pytest_llmload.core.results import ErrorInfo, LoadResult
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.base_revision import BaseRevision
from pytest_llmload.host.loads.gpu_leases import Lease, lease
from pytest_llmload.host.loads.inline import InlineProcess
from pytest_llmload.host.loads.model_files import Files
from pytest_llmload.host.loads.opened import Opened
from pytest_llmload.host.loads.preloaded_modules import BASE, own_modules
from pytest_llmload.host.loads.processes import LoadDied, LoadProcess, Server, environment, start_cold
from pytest_llmload.host.loads.progress import Display, Watch
from pytest_llmload.host.loads.spare import Spare
from pytest_llmload.system.nodes import local_size
from pytest_llmload.system.scratch import LOAD, LOGS, Scratch, remove_abandoned

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.strategies import Strategies
    from pytest_llmload.host.settings.probes import OwnProbes
    from pytest_llmload.host.settings.settings import Settings

_PLAN_TIMEOUT = 300.0
#: Largest share of a GPU that the weights of a load may take if a further process is prepared at the same time.
_BESIDE = 0.25
#: Largest share of a GPU that a process may take whose end the next load does not wait for.
_ENDING = 0.5
#: The first phases of a load in which its context exists: without and with a process prepared for it.
_WITH_CONTEXT = ("warm_up", "page_cache")
#: The device, and the folder of the baselines, of a server that runs already: it is on a different machine.
ENDPOINT = "endpoint"
#: Variables that pytest changes between tests and that loads do not read.
_VOLATILE = ("PYTEST_CURRENT_TEST",)
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
        self._probes = probes
        self._device = device
        self._finished = finished
        self.describe = describe
        self._cwd = cwd
        #: Models that were handed out and may not be closed yet.
        self._opened: list[Opened] = []
        self._files = Files(settings, lambda: start_cold(self._log("resolve"), self.environment(None)), display)
        self._plans: dict[LoadSpec, dict[str, float]] = {}
        self._server: Server | None = None
        self._server_env: dict[str, str] = {}
        self._spare = Spare()
        #: The driver's library, which takes longer to start than to answer, from the first lease of GPUs to the end.
        self._driver: contextlib.ExitStack | None = None
        #: A process that was told to end while the next one is ready; None once it was waited for.
        self._ending: LoadProcess | None = None
        #: Loads that were measured.
        self._measured: set[LoadSpec] = set()
        #: True once the server was asked to import what this run's own loads need.
        self._is_warm = False
        self._folder: Scratch | None = None
        self._logs = 0
        #: Every spec that the collected tests use: the server imports what they need before the first load.
        self.expected: list[LoadSpec] = []
        #: Why loads start with exec although they could fork; None while they fork.
        self.cold_reason: str | None = None

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
        return self._device()

    def checkpoint(self, model: str) -> Checkpoint:
        """Return a model's files. Raises MachineError (network, disk) or LoadFailed (the files are not a model)."""
        # The server imports libraries while the files are examined, built or downloaded.
        self._start_server()
        return self._files.checkpoint(model)

    def runs_already(self, spec: LoadSpec) -> bool:
        """Return whether a load is that of ``--llm-endpoint``, which needs neither GPUs nor files of this machine."""
        return self._settings.endpoint is not None and bool(self._strategies[spec.strategy].takes_endpoint)

    def _checkpoint_of(self, spec: LoadSpec) -> Checkpoint:
        if not self.runs_already(spec):
            found = self.checkpoint(spec.model)
            if found.unreadable and not self._strategies[spec.strategy].own_code:
                raise LoadFailed(found.unreadable)
            return found
        # What the endpoint has loaded cannot be seen; a folder that is here may have its tokenizer.
        return Checkpoint(path=spec.model if Path(spec.model).is_absolute() else "", shape="", weights="")

    def plan(self, spec: LoadSpec) -> dict[str, float]:
        """Return the planner's figures in bytes, from the meta device. Raises MachineError if planning fails."""
        if spec not in self._plans:
            job = self.job(spec, SERVING)
            process = self.start(spec)
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

    def gpus_needed(self, spec: LoadSpec) -> int:
        """Return how many GPUs of this machine a load needs. Raises MachineError if its ranks do not divide."""
        if self.runs_already(spec):
            return 0
        in_ranks = self._strategies[spec.strategy].runs_in == RANKS
        return max(spec.gpu_count, local_size(spec.world_size) if in_ranks else spec.world_size)

    def _device_of(self, spec: LoadSpec) -> Device:
        """Return the device that a load runs on; an endpoint's is the CPU, as this machine has the client only."""
        return Device(kind="cpu", key=ENDPOINT) if self.runs_already(spec) else self.device()

    def job(self, spec: LoadSpec, scope: Scope, held: Lease | None = None) -> Job:
        device = self._device_of(spec)
        if device.kind == "cuda":
            gpus = held.gpus if held is not None else device.gpus[: self.gpus_needed(spec)]
            device = dataclasses.replace(device, gpus=gpus)
        return Job(
            spec=spec,
            device=device,
            checkpoint=self._checkpoint_of(spec),
            adapter=self._files.adapter(spec),
            imports=self._settings.imports,
            strategies=self._strategies.registered,
            methods=self._strategies.methods,
            figures=scope.figures,
            probes=self._probes.of(scope),
            sys_path=tuple(sys.path),
            cwd=str(self._cwd),
            trust_remote_code=self._settings.trust_remote_code,
            measure=scope.measure,
            checks=scope.checks,
            generates=scope.generates,
            endpoint=(self._settings.endpoint or "") if self.runs_already(spec) else "",
            timeout=self._settings.timeout,
            page_cache=self._settings.page_cache if scope.measure and not self.predicts else UNCONTROLLED,
            predicted=self.predicts,
        )

    def _lease(self, spec: LoadSpec) -> Lease:
        """Return GPUs for a load, after every load of this run has given its own back.

        A load that is used again reopens. Raises MachineError if the GPUs are not free in time.
        """
        self._close_opened()
        self._await_end()
        if self.predicts:
            return Lease(self.device().gpus[: self.gpus_needed(spec)])
        device = self._device_of(spec)
        if device.kind == "cuda" and self._driver is None:
            self._driver = contextlib.ExitStack()
            self._driver.enter_context(hardware.nvml())
        return lease(
            device,
            self.gpus_needed(spec),
            wait_foreign=self._settings.wait_gpu,
            wait_lock=self._settings.timeout,
        )

    def start(self, spec: LoadSpec) -> LoadProcess | InlineProcess:
        """Return a process for a load: forked from the warm server, or with exec if its environment differs."""
        if self._settings.inline:
            return InlineProcess()
        env = self.environment(spec)
        log = self._log(spec.slug)
        self._start_server()
        if self._server is not None and env == self._server_env:
            if not self._is_warm:
                self._warm_up(self._server, spec)
            try:
                process = self._server.fork(log)
            except MachineError:
                self._end_server()
                raise
            if isinstance(process, LoadProcess):
                return process
            self.cold_reason = process
            self._end_server()
        return start_cold(log, env)

    def _start_server(self) -> None:
        """Start the warm server, which imports what every load needs, unless it runs or loads cannot be forked."""
        if self._server is not None and self._server.exit_status is not None:
            # The server was killed while it waited, perhaps for its memory: fork the next loads from a new server.
            self._end_server()
        if self._server is not None or self.cold_reason is not None or self._settings.inline:
            return
        self._server_env = self.environment(None)
        self._server, self._is_warm = Server(self._log("server"), self._server_env), False
        self._server.warm_up(BASE, self._cuda())

    def _end_server(self) -> None:
        """End every load, then the warm server. A load that is used again reopens."""
        self._spare.discard()
        self._close_opened()
        self._await_end()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _close_opened(self) -> None:
        for opened in self._opened:
            opened.close()
        self._opened = []

    def _end(self, process: LoadProcess | InlineProcess, held: Lease) -> None:
        """End the process of a load, and give its GPUs back.

        While the next load's process is ready, it is not waited for: the kernel needs a while to take its memory apart,
        which is in no figure of the next load. No load that is timed has its process made ready.
        """
        later: LoadProcess | None = None
        try:
            self._await_end()
            if self._spare.job is not None and isinstance(process, LoadProcess) and process.alive:
                fits = all(hardware.used_by(gpu, process.pid) <= _ENDING * gpu.total for gpu in held.gpus)
                later = process if fits else None
        finally:
            if later is not None:
                later.hang_up()
            else:
                process.close()
            self._ending = later
            held.release()

    def _await_end(self) -> None:
        """Wait for the process that was told to end, if there is one."""
        if self._ending is not None:
            self._ending.close()
            self._ending = None

    def _warm_up(self, server: Server, spec: LoadSpec) -> None:
        """Have the server import what this run's loads need, including the first load."""
        specs = [each for each in (*self.expected, spec) if not self.runs_already(each)]
        # Which modules a model needs is known from its config; one that is not to be had fails its own tests.
        checkpoints = self._files.available(dict.fromkeys(each.model for each in specs))
        model_types = [checkpoint.model_type for checkpoint in checkpoints]
        server.warm_up(own_modules(specs, model_types, self._strategies), self._cuda())
        self._is_warm = True

    def _cuda(self) -> dict[str, object] | None:
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

    def environment(self, spec: LoadSpec | None) -> dict[str, str]:
        """Return the environment of a load's process; without a spec, that of the server and the downloads."""
        env = environment({name: value for name, value in os.environ.items() if name not in _VOLATILE})
        if spec is not None:
            env.update(dict(spec.env))
        return env

    def _log(self, name: str) -> Path:
        if self._folder is None:
            self._folder = Scratch(LOGS)
        self._logs += 1
        return self._folder.files / f"{self._logs:03d}-{name}.log"

    def close(self) -> None:
        """End every process; remove the logs and the files that killed loads have left on disk."""
        self._end_server()
        remove_abandoned(LOAD)
        if self._folder is not None:
            self._folder.close()
            self._folder = None
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
        self._checkpoint_of(spec)
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
        result = self._request(opened.process, self.job(spec, scope))
        if scope.checks:
            self._finished(result)
        return result, opened

    def predict_at(self, spec: LoadSpec, root: Path, revision: str) -> LoadResult:
        """Return the prediction for a load with the user's code of a git revision. Raises MachineError."""
        base = BaseRevision(root, revision)
        job = self.job(spec, EVERYTHING)
        there = dataclasses.replace(
            job, sys_path=tuple(base.path(path) for path in job.sys_path), cwd=base.path(job.cwd)
        )
        process = start_cold(self._log("base"), {**self.environment(spec), **base.environment(job.sys_path)})
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
            process = process or self.start(spec)
            job = self.job(spec, scope, held)
            self._measured.add(spec)
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
        expected = self._spare.job
        if expected is None:
            return None
        self._close_opened()
        gpus = expected.device.gpus
        own = {self._spare.pid, *([self._ending.pid] if self._ending is not None else [])}
        if any(hardware.holders(gpu, own) for gpu in gpus):
            # A foreign process uses the GPU by now: the lease waits for it, or names it.
            self._spare.discard()
            return None
        return self._spare.take(self.job(spec, scope, Lease(gpus)))

    def _beside(self, process: LoadProcess | InlineProcess, job: Job, scope: Scope, held: Lease, phase: str) -> None:
        """Prepare a process for the load that probably follows (the next, or the same) while a load is measured.

        It is not done while a load is timed, nor if the driver hides which processes use a GPU, since a spare would be
        mistaken for a foreign process; and only if its context and one layer fit next to the load with room to spare.
        """
        server = self._server
        if phase not in _WITH_CONTEXT or server is None or not isinstance(process, LoadProcess):
            return
        if self.predicts or scope != WITHOUT_TIMES or not held.gpus or "PYTEST_XDIST_WORKER" in os.environ:
            return
        if job.checkpoint.bytes > _BESIDE * min(gpu.total for gpu in held.gpus):
            return
        if not all(hardware.used_by(gpu, process.pid) for gpu in held.gpus):
            return
        self._await_end()
        spec = next((each for each in self.expected if each not in self._measured), job.spec)
        same_place = (
            spec.model == job.spec.model
            and spec.adapter in (None, job.spec.adapter)
            and self.gpus_needed(spec) == len(held.gpus)
            and not self.runs_elsewhere(spec)
            and self.environment(spec) == self._server_env
        )
        if same_place:
            self._spare.make(self.job(spec, scope, held), held.descriptors, lambda: server.fork(self._log("spare")))

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
