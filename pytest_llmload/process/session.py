"""One load's process: it loads once, then answers ``generate`` and ``run`` until the pytest process hangs up."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from pytest_llmload.core import results
from pytest_llmload.core.errors import MACHINE_ERRORS, LoadFailed, MachineError, RequirementMissing
from pytest_llmload.core.job import HERE, Job
from pytest_llmload.process.debuggers import without_terminal
from pytest_llmload.process.missing_requirement import missing_requirement
from pytest_llmload.quantisation import registry
from pytest_llmload.system.disk_full import is_disk_full
from pytest_llmload.system.process_exit import Died
from pytest_llmload.system.protocol import Channel, Closed, Garbled, Message
from pytest_llmload.worker.model.device import is_out_of_memory

if TYPE_CHECKING:
    from pytest_llmload.process.measurement import Measurement


#: The parts of this package that call the user's code and the libraries; tracebacks begin below them.
_CALLERS = tuple(f"{Path(__file__).parents[1] / part}/" for part in ("process", "strategies"))


class Runner(Protocol):
    """A load whose model is in different processes from the one that serves the session."""

    def load(self) -> results.LoadResult:
        """Load and measure; return the result."""

    def ask(self, message: Message) -> Message:
        """Answer ``generate`` or ``run``."""

    def close(self) -> None:
        """End the processes that have the model."""


#: Starts the other processes of a load, from ``runs_in`` of its strategy, the job, and the function that is called with
#: each phase.
StartRunner: TypeAlias = Callable[[str, Job, Callable[[str], None]], Runner]


class Session:
    """The messages that a load's process understands; each method returns the reply."""

    def __init__(self, channel: Channel, start_runner: StartRunner | None = None) -> None:
        """Make a session that answers on a channel.

        Args:
            channel: Connects to the process that sends the requests.
            start_runner: Starts the processes of a load whose model is not in this one; without it, such a load is
                refused.
        """
        self._channel = channel
        self._start_runner = start_runner
        #: The load in other processes; None if the model is in this process.
        self.runner: Runner | None = None
        self.loaded: Any = None
        #: A measurement whose imports, context and first kernels are done before its load is requested.
        self._ready: Measurement | None = None
        #: Seconds without a request after which this process ends; None if it waits for ever.
        self._idle: float | None = None
        #: File descriptors received with messages: locks of GPUs, which are held as long as this process lives.
        self._descriptors: list[int] = []
        self._fingerprint: object = None
        self.phase = "start"

    def serve(self) -> None:
        """Answer requests until the pytest process hangs up, or until the load's own code has broken the connection.

        A process that was made ready also ends if no load is requested in time.
        """
        try:
            while True:
                message, descriptors = self._channel.receive(self._idle)
                self._descriptors += descriptors
                reply = self._reply(message)
                self._channel.send(reply, tuple(reply.pop("descriptors", ())))
        except Garbled as error:
            sys.stderr.write(f"code of the load closed or wrote to the connection to the pytest process: {error}\n")
        except (Closed, TimeoutError):
            return

    def _reply(self, message: Message) -> Message:
        try:
            reply: Message = getattr(self, f"do_{message['kind']}")(message)
        except Died as death:
            return {"kind": "died", "outcome": death.outcome, "error": asdict(death.info), "signal": death.signal}
        except Closed:
            raise
        except told() as error:
            return describe(error, self.phase)
        return reply

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._channel.send({"kind": "phase", "phase": phase})

    def do_resolve(self, message: Message) -> Message:
        """Download or build a model's files, and compute their digests."""
        from pytest_llmload.worker.checkpoints.resolve import resolve

        self._enter("resolve")
        checkpoint = resolve(
            message["spec"],
            Path(message["cache_dir"]),
            trust_remote_code=message["trust_remote_code"],
            with_values=message.get("with_values", True),
            layers=message.get("layers"),
            tell=self._downloads,
        )
        return {"kind": "checkpoint", "checkpoint": asdict(checkpoint)}

    def _downloads(self, size: int, folder: Path) -> None:
        self.phase = "download"
        self._channel.send({"kind": "phase", "phase": self.phase, "expected": size, "folder": str(folder)})

    def do_adapter(self, message: Message) -> Message:
        """Build a random adapter, find a directory, or download; then compute the digest of the adapter's files."""
        from pytest_llmload.core.job import Adapter, Checkpoint
        from pytest_llmload.worker.checkpoints.digests import adapter_digest
        from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter

        self._enter("resolve")
        cache_dir = Path(message["cache_dir"])
        path = resolve_adapter(
            message["spec"],
            Checkpoint(**message["checkpoint"]),
            cache_dir,
            trust_remote_code=message["trust_remote_code"],
            layers=message.get("layers"),
            auto_class=message.get("auto_class"),
        )
        return {"kind": "adapter", "adapter": asdict(Adapter(str(path), adapter_digest(path, cache_dir)))}

    def do_plan(self, message: Message) -> Message:
        """Predict a job's memory without reading a weight."""
        from pytest_llmload.process.job_strategies import plan

        self._enter("plan")
        job = Job.from_json(message["job"])
        prepare(job)
        return {"kind": "plan", "plan": plan(job)}

    def do_ready(self, message: Message) -> Message:
        """Do what precedes a load and is not part of a figure, while the previous load is measured."""
        from pytest_llmload.process.measurement import Measurement

        job = Job.from_json(message["job"])
        prepare(job)
        measurement = Measurement(job, self._enter)
        measurement.ready()
        self._ready, self._idle = measurement, message["idle"]
        return {"kind": "ready"}

    def do_claim(self, message: Message) -> Message:
        """Stay alive for the load that was made ready, which is requested next."""
        self._idle = None
        return {"kind": "claimed", "descriptors": self._descriptors}

    def do_load(self, message: Message) -> Message:
        """Load and measure a job in the place where its strategy runs; answer with the result."""
        from pytest_llmload.process.job_strategies import runs_in

        job = Job.from_json(message["job"])
        if self.runner is not None:
            return self._repeated(job)
        prepare(job)
        place = runs_in(job)
        if job.predicted:
            return self.predicted(job, place)
        if place == HERE:
            return self.measured(job)
        if self._start_runner is None:
            raise RuntimeError(f"strategy {job.spec.strategy!r} needs processes of its own: not under inline isolation")
        self.runner = self._start_runner(place, job, self._enter)
        return {"kind": "result", "result": self.runner.load().to_json()}

    def predicted(self, job: Job, place: str) -> Message:
        """Trace the load in this process on fake tensors; there is no model afterwards."""
        from pytest_llmload.process.predicting import not_here, predict

        result = predict(job, self._enter) if place == HERE else not_here(job, place)
        return {"kind": "result", "result": result.to_json()}

    def _repeated(self, job: Job) -> Message:
        """Measure again what this process has already found: a running endpoint, which a load does not change."""
        from pytest_llmload.process.serving.served_model import ServedModel

        assert isinstance(self.runner, ServedModel), "other loads are repeated in processes of their own"
        return {"kind": "result", "result": self.runner.repeat(job).to_json()}

    def measured(self, job: Job) -> Message:
        """Load and measure here; an error has the figures that were measured until then."""
        from pytest_llmload.process.measurement import Measurement

        ready = self._ready if self._ready is not None and self._ready.job == job else None
        measurement = ready or Measurement(job, self._enter)
        result = measurement.result
        try:
            _, self.loaded = measurement.measure()
        except told() as error:
            # With the figures that were measured until then.
            return {**describe(error, self.phase), "result": result.to_json()}
        if self.loaded is not None:
            self._fingerprint = _fingerprint(self.loaded)
        self.phase = "idle"
        return {"kind": "result", "result": result.to_json()}

    def _asked(self, message: Message) -> Message:
        assert self.runner is not None
        reply: Message = self.runner.ask(message)
        return reply

    def close(self) -> None:
        """Release what would outlive this process."""
        for part in (self.loaded, self.runner):
            if part is not None:
                part.close()

    def do_generate(self, message: Message) -> Message:
        """Continue a prompt with the loaded model; answer with tokens and text."""
        if self.runner is not None:
            return self._asked(message)
        from pytest_llmload.worker.model.generation import generate

        self._enter("generate")
        return {"kind": "value", **generate(self.loaded, message["text"], message["max_new_tokens"])}

    def do_run(self, message: Message) -> Message:
        """Call a test's function with the model and the tokenizer; answer with what it returned and printed."""
        if self.runner is not None:
            return self._asked(message)
        from pytest_llmload.process import calls, run_output

        self._enter("run")
        # The tokenizer is loaded at its first use, which is now at the latest.
        words = _words(self.loaded)
        with run_output.kept(message) as printed:
            try:
                reply = calls.call(message, self.loaded)
            except told() as raised:
                error = without_terminal(raised)
                reply = {**describe(error, "run"), "arguments": calls.arguments(error)}
        now = _fingerprint(self.loaded)
        # A model that can no longer be inspected was changed too.
        changed = now is None or now != self._fingerprint or _words(self.loaded) != words
        self._fingerprint = now
        return {**reply, **printed, "changed": changed}


def _fingerprint(loaded: Any) -> object:
    """Return the model's fingerprint; None if a test's function has broken the model so that it cannot be computed."""
    from pytest_llmload.process.model_changes import fingerprint

    try:
        return fingerprint(loaded.outermost)
    except Exception:  # noqa: BLE001 - after any exception the model is not given to a further test
        return None


def _words(loaded: Any) -> int:
    """Return the number of the tokenizer's tokens; -1 if it has no length."""
    try:
        return len(loaded.tokenizer)
    except Exception:  # noqa: BLE001 - the user's loader may return any object as a tokenizer
        return -1


def prepare(job: Job) -> None:
    """Set this process up for the job: visible GPUs, environment, import path, working directory."""
    if job.device.kind == "cuda":
        visible = ",".join(gpu.uuid for gpu in job.device.gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ.update(dict(job.spec.env))
    sys.path.extend(path for path in job.sys_path if path not in sys.path)
    if job.cwd:
        os.chdir(job.cwd)
    registry.use(job.methods)


def told() -> tuple[type[BaseException], ...]:
    """Return the exceptions that are reported to the pytest process: errors, ``sys.exit``, and pytest's outcomes.

    ``pytest.fail`` and ``pytest.skip`` raise exceptions that are not an ``Exception``; the code that raises them has
    imported pytest in this process.
    """
    outcomes = sys.modules.get("_pytest.outcomes")
    return Exception, SystemExit, *((outcomes.OutcomeException,) if outcomes is not None else ())


def describe(error: BaseException, phase: str) -> Message:
    """Return an exception as a message: out of memory, a fault of the machine, or an exception of the load."""
    error = without_terminal(error)
    kind = type(error)
    if isinstance(error, MachineError):
        outcome = next(name for name, own in reversed(MACHINE_ERRORS.items()) if isinstance(error, own))
    elif lacks := missing_requirement(error):
        error = RequirementMissing(lacks).with_traceback(error.__traceback__)
        outcome = "missing"
    elif is_disk_full(error):
        error = MachineError(f"the disk is full: {_text(error)}").with_traceback(error.__traceback__)
        outcome = "machine"
    elif is_out_of_memory(error):
        outcome = results.OUT_OF_MEMORY
    else:
        outcome = results.FAILED
    text = _text(error)
    # This package's own errors are whole sentences already.
    type_name = "" if isinstance(error, (MachineError, LoadFailed)) else f"{kind.__module__}.{kind.__qualname__}"
    info = results.ErrorInfo(
        message=text if type_name else text or kind.__name__,
        type_name=type_name.removeprefix("builtins."),
        traceback=_traceback(error),
        phase=phase,
    )
    return {"kind": "error", "outcome": outcome, "error": asdict(info)}


def _text(error: BaseException) -> str:
    """Return an exception's message, or why it cannot be shown."""
    try:
        return str(error)
    except Exception as broken:  # noqa: BLE001 - the exception's class is code of the user or of a library
        return f"its message cannot be shown, since its __str__ raises {type(broken).__name__}"


def _traceback(error: BaseException) -> str:
    """Return an exception's traceback as text; without its causes if those cannot be shown.

    It begins at the first frame that is not of a load's process itself, nor of a strategy.
    """
    begin = error.__traceback__
    while begin is not None and begin.tb_frame.f_code.co_filename.startswith(_CALLERS):
        begin = begin.tb_next
    begin = begin or error.__traceback__
    try:
        return "".join(traceback.format_exception(type(error), error, begin))
    except Exception:  # noqa: BLE001 - formatting reads attributes of the exceptions, whose code may raise
        return "".join(traceback.format_tb(begin))
