"""One load's process: loads once, then answers ``generate`` and ``run`` until the other side hangs up."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_llmload.core import results
from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.job import Job
from pytest_llmload.core.protocol import Channel, Closed, Message
from pytest_llmload.worker import process
from pytest_llmload.worker.device import is_out_of_memory
from pytest_llmload.worker.ranks.failures import RankDied


class Session:
    """The messages a load process understands; each returns the reply."""

    def __init__(self, channel: Channel, log: str = "") -> None:
        self._channel = channel
        self._log = log
        #: The processes that a load in ranks consists of; None where the model is here.
        self.ranks: Any = None
        self.loaded: Any = None
        self._fingerprint: object = None
        self.phase = "start"

    def serve(self) -> None:
        while True:
            try:
                message, _ = self._channel.receive()
            except Closed:
                return
            try:
                reply = getattr(self, f"do_{message['kind']}")(message)
            except RankDied as death:
                reply = {"kind": "died", "outcome": death.outcome, "error": asdict(death.info), "signal": death.signal}
            except Exception as error:  # noqa: BLE001 - whatever it is, the pytest process is told
                reply = describe(error, self.phase)
            self._channel.send(reply)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._channel.send({"kind": "phase", "phase": phase})

    def do_resolve(self, message: Message) -> Message:
        """Bring a model's files here: download or build, then the digests."""
        from pytest_llmload.worker.checkpoints.resolve import resolve

        self._enter("resolve")
        checkpoint = resolve(
            message["spec"], Path(message["cache_dir"]), trust_remote_code=message["trust_remote_code"]
        )
        return {"kind": "checkpoint", "checkpoint": asdict(checkpoint)}

    def do_adapter(self, message: Message) -> Message:
        """Bring an adapter's files here: build a random one, look at a directory, or download; then their digest."""
        from pytest_llmload.core.job import Adapter, Checkpoint
        from pytest_llmload.worker.checkpoints.adapter import resolve_adapter
        from pytest_llmload.worker.checkpoints.digests import adapter_digest

        self._enter("resolve")
        cache_dir = Path(message["cache_dir"])
        path = resolve_adapter(
            message["spec"],
            Checkpoint(**message["checkpoint"]),
            cache_dir,
            trust_remote_code=message["trust_remote_code"],
        )
        return {"kind": "adapter", "adapter": asdict(Adapter(str(path), adapter_digest(path, cache_dir)))}

    def do_plan(self, message: Message) -> Message:
        from pytest_llmload.worker.planner import plan

        self._enter("plan")
        job = Job.from_json(message["job"])
        prepare(job)
        return {"kind": "plan", "plan": plan(job)}

    def do_load(self, message: Message) -> Message:
        from pytest_llmload.worker.plan import in_ranks

        job = Job.from_json(message["job"])
        prepare(job)
        return self._in_ranks(job) if in_ranks(job) else self.measured(job)

    def _in_ranks(self, job: Job) -> Message:
        from pytest_llmload.worker.imports import import_all
        from pytest_llmload.worker.plan import strategies
        from pytest_llmload.worker.ranks.launcher import Ranks

        if not self._log:
            raise RuntimeError(f"strategy {job.spec.strategy!r} needs processes of its own: not under inline isolation")
        # Once for all ranks, which are forked from here.
        self._enter("import")
        import_all(job, strategies(job), cold=False)
        self.ranks = Ranks(job, self._enter, Path(f"{self._log}.ranks"))
        return {"kind": "result", "result": self.ranks.load().to_json()}

    def measured(self, job: Job) -> Message:
        """Load and measure here."""
        from pytest_llmload.worker.fingerprint import fingerprint
        from pytest_llmload.worker.measure import measure

        result, self.loaded = measure(job, self._enter)
        if self.loaded is not None:
            self._fingerprint = fingerprint(self.loaded.model)
        self.phase = "idle"
        return {"kind": "result", "result": result.to_json()}

    def _of_ranks(self, message: Message) -> Message:
        reply: Message = self.ranks.ask(message)
        return reply

    def do_generate(self, message: Message) -> Message:
        from pytest_llmload.worker.generation import generate

        if self.ranks is not None:
            return self._of_ranks(message)
        self._enter("generate")
        return {"kind": "value", **generate(self.loaded, message["text"], message["max_new_tokens"])}

    def do_run(self, message: Message) -> Message:
        from pytest_llmload.worker import calls
        from pytest_llmload.worker.fingerprint import fingerprint

        if self.ranks is not None:
            return self._of_ranks(message)
        self._enter("run")
        try:
            reply = calls.call(message, self.loaded)
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            reply = describe(error, "run")
        now = fingerprint(self.loaded.model)
        changed, self._fingerprint = now != self._fingerprint, now
        return {**reply, "changed": changed}


def prepare(job: Job) -> None:
    """Make this process see what the job may see: GPUs, environment, import path, working directory."""
    if job.device.kind == "cuda":
        visible = ",".join(gpu.uuid for gpu in job.device.gpus)
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ.update(dict(job.spec.env))
    sys.path.extend(path for path in job.sys_path if path not in sys.path)
    if job.cwd:
        os.chdir(job.cwd)


def describe(error: Exception, phase: str) -> Message:
    """An exception as a message: out of memory, the machine's fault, or simply raised."""
    kind = type(error)
    message = str(error) or kind.__name__
    if isinstance(error, MachineError):
        outcome = "machine"
    elif is_out_of_memory(error):
        outcome = results.OUT_OF_MEMORY
    else:
        outcome = results.FAILED
    # Our own errors are whole sentences already.
    type_name = "" if isinstance(error, (MachineError, LoadFailed)) else f"{kind.__module__}.{kind.__qualname__}"
    info = results.ErrorInfo(
        message=message,
        type_name=type_name.removeprefix("builtins."),
        traceback="".join(traceback.format_exception(error)),
        phase=phase,
    )
    return {"kind": "error", "outcome": outcome, "error": asdict(info)}


def main(fd: int, log: str) -> int:
    """Serve one channel until it closes; the process's exit status."""
    # Its own session, so that a kill reaches whatever the load starts, and Ctrl-C does not.
    os.setsid()
    process.log_to(log)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    session = Session(Channel(socket.socket(fileno=fd)), log)
    session.serve()
    if session.loaded is not None:
        session.loaded.close()
    sys.stdout.flush()
    sys.stderr.flush()
    return 0
