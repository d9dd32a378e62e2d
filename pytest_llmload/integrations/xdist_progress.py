"""pytest-xdist: the controller prints how far the loads of its workers are, which have no terminal.

Each worker writes its step to a file of the run's folder. A thread of the controller looks at the files and puts them
into the queue of xdist's own events, so that the main thread shows them between two reports.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.host.loads.progress import Display, Step
from pytest_llmload.host.run.progress import LiveLine, PlainLines, display_of

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
    """The controller's thread, and what it shows: one live line for all workers on a terminal, else plain lines."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._ended = threading.Event()
        self._lines: dict[str, PlainLines] = {}
        session: Any = config.pluginmanager.getplugin("dsession")
        self._reporter = config.pluginmanager.getplugin("terminalreporter")
        if session is None or self._reporter is None:
            return
        self._display = display_of(config)
        if not self._display.interval:
            return
        setattr(session, f"worker_{_EVENT}", self._show)
        config.pluginmanager.register(_Clearing(self._display), "llmload-xdist-progress")
        thread = threading.Thread(target=self._look, args=(session.queue,), name="llmload progress", daemon=True)
        thread.start()

    def _look(self, queue: Any) -> None:
        while not self._ended.wait(INTERVAL):
            steps = {}
            for file in sorted(self._folder.glob(f"*{_SUFFIX}")):
                with contextlib.suppress(FileNotFoundError):
                    steps[file.stem] = Step(**json.loads(file.read_text(encoding="utf-8")))
            queue.put((_EVENT, {"steps": steps}))

    def _show(self, steps: Mapping[str, Step]) -> None:
        if not isinstance(self._display, LiveLine):
            for worker, step in steps.items():
                self._lines.setdefault(worker, PlainLines(self._config, self._reporter)).show(step)
        elif steps:
            self._display.show(*steps.values())
        else:
            self._display.clear()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()


class _Clearing:
    """A plugin that removes the live line before pytest and xdist write."""

    def __init__(self, display: Display) -> None:
        self._display = display

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        """Clear before a test's name.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_logstart
        """
        self._display.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self) -> None:
        """Clear before a test's outcome.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_logreport
        """
        self._display.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_testnodedown(self) -> None:
        """Clear before xdist says that a worker died.

        https://github.com/pytest-dev/pytest-xdist/blob/master/src/xdist/newhooks.py
        """
        self._display.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Clear before the summary.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_sessionfinish
        """
        self._display.clear()
