"""The broker: one shared load per spec and run, its process, and everything it needs before it can start.

Tests stay ordinary pytest items; only the load leaves the process.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmload.core import results
from pytest_llmload.core.errors import (
    LoadCrashed,
    LoadError,
    LoadFailed,
    LoadOutOfMemory,
    LoadTimeout,
    MachineError,
    StrategyNotApplied,
)
from pytest_llmload.core.job import Checkpoint, Device, Job
from pytest_llmload.core.nodes import local_size
from pytest_llmload.core.results import ErrorInfo, LoadResult
from pytest_llmload.host import calls
from pytest_llmload.host.inline import InlineProcess
from pytest_llmload.host.leases import Lease, lease
from pytest_llmload.host.processes import LoadDied, LoadProcess, Server, start_cold
from pytest_llmload.host.warmth import warm_modules

if TYPE_CHECKING:
    from pytest_llmload.core.protocol import Message
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.options import Settings
    from pytest_llmload.host.strategies import Strategies

#: Downloads and builds of checkpoints; their progress is the network's and the disk's.
_RESOLVE_TIMEOUT = 6 * 3600.0
_PLAN_TIMEOUT = 300.0
#: Variables that pytest changes between tests and no load looks at.
_VOLATILE = ("PYTEST_CURRENT_TEST",)
_ERRORS: dict[str, type[LoadError]] = {
    results.OUT_OF_MEMORY: LoadOutOfMemory,
    results.CRASHED: LoadCrashed,
    results.TIMEOUT: LoadTimeout,
    results.FAILED: LoadFailed,
    results.NOT_APPLIED: StrategyNotApplied,
}


class Broker:
    """Loads models for tests: at most one process at a time, closed after its last user."""

    def __init__(
        self,
        settings: Settings,
        strategies: Strategies,
        device: Callable[[], Device],
        finished: Callable[[LoadResult], None],
        describe: Callable[[LoadResult], str],
        cwd: Path,
    ) -> None:
        self._settings = settings
        self._strategies = strategies
        self._device = device
        self._finished = finished
        self.describe = describe
        self._cwd = cwd
        self._loads: dict[LoadSpec, Load] = {}
        #: Loads whose process is running.
        self._live: set[Load] = set()
        self._checkpoints: dict[str, Checkpoint | MachineError | LoadFailed] = {}
        self._plans: dict[LoadSpec, dict[str, float]] = {}
        self._server: Server | None = None
        self._server_env: dict[str, str] = {}
        self._folder: Path | None = None
        self._logs = 0
        #: Every spec that the collected tests use: what the server imports before the first load.
        self.expected: list[LoadSpec] = []
        #: Seconds that the server's imports took; None before there is one.
        self.warm_up_seconds: float | None = None
        #: Why loads start with exec although they could fork; None while they fork.
        self.cold_reason: str | None = None

    def load(self, spec: LoadSpec) -> Load:
        """The shared load of a spec; nothing starts before it is measured or used."""
        return self._loads.setdefault(spec, Load(self, spec))

    def private_load(self, spec: LoadSpec) -> Load:
        """A load that is shared with nobody."""
        return Load(self, spec)

    @property
    def timeout(self) -> float:
        return self._settings.timeout

    def device(self) -> Device:
        return self._device()

    def checkpoint(self, model: str) -> Checkpoint:
        """A model's files on this machine: downloaded or built once per run.

        Raises MachineError (network, disk) or LoadFailed (the files are no model).
        """
        found = self._checkpoints.get(model) or self._checkpoints.setdefault(model, self._resolve(model))
        if isinstance(found, Checkpoint):
            return found
        raise found

    def _resolve(self, model: str) -> Checkpoint | MachineError | LoadFailed:
        process = start_cold(self._log("resolve"), self.environment(None))
        try:
            reply = process.request(
                {
                    "kind": "resolve",
                    "spec": model,
                    "cache_dir": str(self._settings.cache_dir),
                    "trust_remote_code": self._settings.trust_remote_code,
                },
                _RESOLVE_TIMEOUT,
            )
        except LoadDied as death:
            return MachineError(f"preparing {model!r}: {death}\n{death.info.log}")
        finally:
            process.close()
        if reply["kind"] == "error":
            info = ErrorInfo(**reply["error"])
            own = LoadFailed if reply["outcome"] == results.FAILED and not info.type_name else MachineError
            return own(info.message if not info.type_name else f"preparing {model!r}: {_first_cause(info)}")
        return Checkpoint(**reply["checkpoint"])

    def plan(self, spec: LoadSpec) -> dict[str, float]:
        """The planner's figures in bytes, made on the meta device. Raises MachineError if they cannot be made."""
        if spec not in self._plans:
            job = self.job(spec, measure=False)
            process = self.start(spec)
            try:
                reply = process.request({"kind": "plan", "job": job.to_json()}, _PLAN_TIMEOUT)
            except LoadDied as death:
                raise MachineError(f"planning {spec.id}: {death}\n{death.info.log}") from None
            finally:
                process.close()
            if reply["kind"] == "error":
                raise MachineError(f"planning {spec.id}: {_first_cause(ErrorInfo(**reply['error']))}")
            self._plans[spec] = reply["plan"]
        return self._plans[spec]

    def gpus_needed(self, spec: LoadSpec) -> int:
        """GPUs of this machine. Raises MachineError where ranks do not divide among several machines."""
        in_ranks = self._strategies[spec.strategy].in_ranks
        return max(spec.gpu_count, local_size(spec.world_size) if in_ranks else spec.world_size)

    def job(self, spec: LoadSpec, *, measure: bool, held: Lease | None = None) -> Job:
        device = self.device()
        if device.kind == "cuda":
            gpus = held.gpus if held is not None else device.gpus[: self.gpus_needed(spec)]
            device = dataclasses.replace(device, gpus=gpus)
        return Job(
            spec=spec,
            device=device,
            checkpoint=self.checkpoint(spec.model),
            imports=self._settings.imports,
            strategies=self._strategies.targets,
            probes=self._strategies.probes,
            sys_path=tuple(sys.path),
            cwd=str(self._cwd),
            trust_remote_code=self._settings.trust_remote_code,
            measure=measure,
        )

    def lease(self, load: Load) -> Lease:
        """GPUs for a load, after every load of this run has given its own back; one that is used again reopens."""
        for other in list(self._live):
            other.close()
        return lease(
            self.device(),
            self.gpus_needed(load.spec),
            wait_foreign=self._settings.wait_gpu,
            wait_lock=self._settings.timeout,
        )

    def start(self, spec: LoadSpec) -> LoadProcess | InlineProcess:
        """A process for a load: forked from the warm server, or with exec where its environment differs."""
        if self._settings.inline:
            return InlineProcess()
        env = self.environment(spec)
        log = self._log(spec.slug)
        if self._server is None and self.cold_reason is None:
            self._start_server()
        if self._server is not None and env == self._server_env:
            process = self._server.fork(log)
            if isinstance(process, LoadProcess):
                return process
            self.cold_reason = process
            self._server.close()
            self._server = None
        return start_cold(log, env)

    def _start_server(self) -> None:
        specs = [*self.expected, *self._loads]
        for model in dict.fromkeys(spec.model for spec in specs):
            # Which modules a model needs is known from its config; one that is not to be had fails its own tests.
            self._checkpoints.setdefault(model, self._resolve(model))
        env = self.environment(None)
        server = Server(self._log("server"), env)
        checkpoints = [found for found in self._checkpoints.values() if isinstance(found, Checkpoint)]
        device = self.device()
        cuda = None
        if device.kind == "cuda":
            cuda = {"count": len(device.gpus), "capability": device.gpus[0].capability}
        modules = warm_modules(specs, [checkpoint.model_type for checkpoint in checkpoints], self._strategies)
        self.warm_up_seconds = server.warm_up(modules, cuda)
        self._server, self._server_env = server, env

    def environment(self, spec: LoadSpec | None) -> dict[str, str]:
        """The environment of a load's process; without a spec, the server's and the downloads'."""
        env = {name: value for name, value in os.environ.items() if name not in _VOLATILE}
        # Without it glibc's heap keeps what it likes of freed weights, and host memory varies by 40 % between runs.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
        # OpenBLAS starts its threads when numpy is imported; a server with threads must not fork.
        env.setdefault("OPENBLAS_NUM_THREADS", "1")
        if spec is not None:
            env.update(dict(spec.env))
        return env

    def _log(self, name: str) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="pytest-llmload-"))
        self._logs += 1
        return self._folder / f"{self._logs:03d}-{name}.log"

    def close(self) -> None:
        """End every process and remove the logs."""
        for load in list(self._live):
            load.close()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def measure(self, load: Load, *, keep: bool) -> LoadResult:
        """Load once in a fresh process and take every figure. Raises MachineError; every other end is a result."""
        spec = load.spec
        self.checkpoint(spec.model)
        held = self.lease(load)
        process = None
        kept = False
        try:
            process = self.start(spec)
            result = self._request(process, self.job(spec, measure=True, held=held))
            if keep and result.ok:
                self._adopt(load, process, held)
                kept = True
            self._finished(result)
            return result
        finally:
            if not kept:
                if process is not None:
                    process.close()
                held.release()

    def reopen(self, load: Load) -> None:
        """Load again only to serve tests: the figures stay those of the first time."""
        held = self.lease(load)
        process = self.start(load.spec)
        result = self._request(process, self.job(load.spec, measure=False, held=held))
        if result.outcome != results.LOADED:
            process.close()
            held.release()
            raise self.error(result)
        self._adopt(load, process, held)

    def _adopt(self, load: Load, process: LoadProcess | InlineProcess, held: Lease) -> None:
        load.adopt(process, held)
        self._live.add(load)

    def closed(self, load: Load) -> None:
        self._live.discard(load)

    def _request(self, process: LoadProcess | InlineProcess, job: Job) -> LoadResult:
        try:
            reply = process.request({"kind": "load", "job": job.to_json()}, self._settings.timeout)
        except LoadDied as death:
            return LoadResult(spec=job.spec.to_json(), outcome=death.outcome, error=death.info)
        if reply["kind"] == "error":
            info = ErrorInfo(**reply["error"])
            info.log = process.tail()
            if reply["outcome"] == "machine":
                raise MachineError(info.message)
            return LoadResult(spec=job.spec.to_json(), outcome=reply["outcome"], error=info)
        return LoadResult.from_json(reply["result"])

    def error(self, result: LoadResult) -> LoadError:
        """The exception that a result which is no loaded model stands for."""
        return _ERRORS[result.outcome](self.describe(result), result)


def _first_cause(info: ErrorInfo) -> str:
    return f"{info.type_name}: {info.message}" if info.type_name else info.message


class Load:
    """One load of a run: its frozen figures, and its process while tests still need it."""

    def __init__(self, broker: Broker, spec: LoadSpec) -> None:
        self.spec = spec
        self._broker = broker
        self._result: LoadResult | None = None
        self._machine_error: MachineError | LoadFailed | None = None
        self._process: LoadProcess | InlineProcess | None = None
        self._lease: Lease | None = None
        self._changed = False
        self._repeats: list[LoadResult] = []

    @property
    def status(self) -> str:
        return "not loaded yet" if self._result is None else self._result.outcome

    @property
    def measured(self) -> bool:
        return self._result is not None

    @property
    def result(self) -> LoadResult:
        """The figures, taken when first asked for. Raises MachineError, again for every test that asks."""
        if self._machine_error is not None:
            raise self._machine_error
        if self._result is None:
            try:
                self._result = self._broker.measure(self, keep=True)
            except MachineError as error:
                self._machine_error = error
                raise
            except LoadFailed as error:
                # The checkpoint itself is no model: the load failed before it could start.
                info = ErrorInfo(message=str(error), phase="resolve")
                self._result = LoadResult(spec=self.spec.to_json(), outcome=results.FAILED, error=info)
        return self._result

    @property
    def error(self) -> LoadError | None:
        """What the tests of this load fail with; None if it is fine."""
        return None if self.result.ok else self._broker.error(self.result)

    def repeats(self, count: int) -> list[LoadResult]:
        """The same load measured anew in fresh processes, alone on the device; once per run."""
        while len(self._repeats) < count:
            self.close()
            self._repeats.append(self._broker.measure(self, keep=False))
        return self._repeats[:count]

    def adopt(self, process: LoadProcess | InlineProcess, held: Lease) -> None:
        self._process, self._lease = process, held
        self._changed = False

    def generate(self, text: str, max_new_tokens: int) -> dict[str, Any]:
        __tracebackhide__ = True
        reply = self._ask({"kind": "generate", "text": text, "max_new_tokens": max_new_tokens})
        if reply["kind"] == "error":
            calls.raise_here(ErrorInfo(**reply["error"]))
        return {name: reply[name] for name in ("tokens", "text")}

    def run(self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        reply = self._ask(calls.encode(function, args, kwargs))
        self._changed |= reply["changed"]
        return calls.decode(reply)

    @property
    def model(self) -> Any:
        if self.error is not None:
            raise self.error
        if not isinstance(self._process, InlineProcess):
            raise RuntimeError(
                "the model lives in a process of its own: use llm.run(function), or --llm-isolation=inline to debug"
            )
        return self._process.model

    def _ask(self, message: Message) -> Message:
        __tracebackhide__ = True
        if self.error is not None:
            raise self.error
        if self._process is None or not self._process.alive:
            self._broker.reopen(self)
        assert self._process is not None
        try:
            return self._process.request(message, self._broker.timeout)
        except LoadDied as death:
            self.close()
            # The figures were taken and stay; what died is the process that served this test.
            result = LoadResult(spec=self.spec.to_json(), outcome=death.outcome, error=death.info)
            raise self._broker.error(result) from None

    def after_test(self) -> None:
        """A load that the test changed is not handed on."""
        if self._changed:
            self.close()

    def close(self) -> None:
        """End the process, if there is one; the figures stay."""
        if self._process is not None:
            self._process.close()
            self._process = None
            self._broker.closed(self)
        if self._lease is not None:
            self._lease.release()
            self._lease = None
