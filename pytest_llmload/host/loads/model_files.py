"""The files of a run's models and adapters: fetched once, by a process that can download and build them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmload.core import results
from pytest_llmload.core.errors import MACHINE_ERRORS, LoadFailed, MachineError
from pytest_llmload.core.job import Adapter, Checkpoint
from pytest_llmload.core.presets import PREFIX
from pytest_llmload.core.results import ErrorInfo
from pytest_llmload.host.loads.processes import LoadDied, LoadProcess
from pytest_llmload.host.loads.progress import Display, Watch
from pytest_llmload.host.settings.adapters import location

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.settings.settings import Settings
    from pytest_llmload.system.protocol import Message

#: Seconds for a download: its progress is the network's. Building a random model is bounded by ``--llm-timeout``.
_DOWNLOAD = 6 * 3600.0


class Files:
    """Models and adapters by their SPECs; one that failed fails again, with the same error, for every test."""

    def __init__(self, settings: Settings, start: Callable[[], LoadProcess], display: Callable[[], Display]) -> None:
        self._display = display
        self._settings = settings
        self._start = start
        self._checkpoints: dict[str, Checkpoint | MachineError | LoadFailed] = {}
        self._adapters: dict[tuple[str, str, str | None], Adapter | MachineError | LoadFailed] = {}

    def checkpoint(self, model: str) -> Checkpoint:
        """Return a model's files, downloaded or built once per run.

        Raises MachineError (network, disk) or LoadFailed (the files are not a model).
        """
        if model not in self._checkpoints:
            reply = self._request(model, {"kind": "resolve", "spec": model})
            self._checkpoints[model] = Checkpoint(**reply["checkpoint"]) if isinstance(reply, dict) else reply
        found = self._checkpoints[model]
        if isinstance(found, Checkpoint):
            return found
        raise found

    def available(self, models: Iterable[str]) -> list[Checkpoint]:
        """Return the files of those models that are available."""
        found = []
        for model in models:
            try:
                found.append(self.checkpoint(model))
            except (MachineError, LoadFailed):
                continue
        return found

    def adapter(self, spec: LoadSpec) -> Adapter | None:
        """Return the files of a load's adapter, downloaded or built once per run, model and class of it; None if the
        load has no adapter.

        Raises the errors of :func:`checkpoint`.
        """
        if spec.adapter is None:
            return None
        key = spec.model, spec.adapter, spec.auto_class
        if key not in self._adapters:
            where = location(spec.adapter, self._settings.root)
            checkpoint = asdict(self.checkpoint(spec.model))
            message = {"kind": "adapter", "spec": where, "checkpoint": checkpoint, "auto_class": spec.auto_class}
            reply = self._request(where, message)
            self._adapters[key] = Adapter(**reply["adapter"]) if isinstance(reply, dict) else reply
        found = self._adapters[key]
        if isinstance(found, Adapter):
            return found
        raise found

    def _request(self, what: str, message: Message) -> Message | MachineError | LoadFailed:
        process = self._start()
        settings = {"cache_dir": str(self._settings.cache_dir), "trust_remote_code": self._settings.trust_remote_code}
        settings["layers"] = self._settings.layers
        settings["with_values"] = self._settings.predict is None
        try:
            is_local = what.startswith(PREFIX) or what == "random" or Path(what).exists()
            timeout = self._settings.timeout if is_local else _DOWNLOAD
            with Watch(self._display(), what) as watch:
                reply = process.request({**message, **settings}, timeout, watch=watch)
        except LoadDied as death:
            return MachineError(f"preparing {what!r}: {death}\n{death.info.log}")
        finally:
            process.close()
        if reply["kind"] != "error":
            return reply
        info = ErrorInfo(**reply["error"])
        failed = LoadFailed if reply["outcome"] == results.FAILED and not info.type_name else MachineError
        own = MACHINE_ERRORS.get(reply["outcome"], failed)
        return own(f"preparing {what!r}: {info}" if info.type_name else info.message)
