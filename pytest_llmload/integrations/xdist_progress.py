"""pytest-xdist: the controller prints how far the loads of its workers are, which have no terminal.

Each worker writes its step to a file of the run's folder. A thread of the controller looks at the files and puts what
is new into the queue of xdist's own events, so that the main thread prints it between two reports.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.host.loads.progress import Step
from pytest_llmload.host.run.progress import PlainLines, display_of

_SUFFIX = ".progress"
#: Seconds between two looks of a worker at its load, and of the controller at the workers' files.
INTERVAL = 1.0
#: xdist's session calls ``worker_<name>`` for each event of its queue.
_EVENT = "llmload_progress"


class WorkerDisplay:
    """Hands the steps of a worker's loads to the controller."""

    interval = INTERVAL

    def __init__(self, folder: Path, worker: str) -> None:
        self._file = folder / f"{worker}{_SUFFIX}"

    def show(self, step: Step) -> None:
        """Write the step where the controller looks."""
        temporary = self._file.with_suffix(".tmp-progress")
        temporary.write_text(json.dumps(asdict(step)), encoding="utf-8")
        temporary.replace(self._file)

    def clear(self) -> None:
        """Take the step away."""
        self._file.unlink(missing_ok=True)


class Watcher:
    """The controller's thread; it ends with the run."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._ended = threading.Event()
        self._displays: dict[str, PlainLines] = {}
        session: Any = config.pluginmanager.getplugin("dsession")
        reporter = config.pluginmanager.getplugin("terminalreporter")
        self._reporter = reporter
        if session is None or reporter is None or not display_of(config).interval:
            return
        setattr(session, f"worker_{_EVENT}", self._show)
        thread = threading.Thread(target=self._look, args=(session.queue,), name="llmload progress", daemon=True)
        thread.start()

    def _look(self, queue: Any) -> None:
        while not self._ended.wait(INTERVAL):
            for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
                try:
                    step = Step(**json.loads(file.read_text(encoding="utf-8")))
                except FileNotFoundError:
                    continue
                queue.put((_EVENT, {"worker": file.stem, "step": step}))

    def _show(self, worker: str, step: Step) -> None:
        display = self._displays.setdefault(worker, PlainLines(self._config, self._reporter))
        display.show(step)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
