"""pytest-xdist: write the reports as the run goes on, from what the workers have measured so far."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pytest_llmload.host.run.stash import existing_state

_SUFFIX = ".log"


class RunningReport:
    """After each test that uses a load, a worker writes its log, and then the controller writes the reports."""

    def __init__(self, config: pytest.Config, folder: Path, worker: str = "") -> None:
        """``folder`` is shared by all; ``worker`` is the worker's id, empty in the controller."""
        self._config = config
        self._folder = folder
        self._worker = worker

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the log before pytest-xdist sends the report to the controller, or the report once it has arrived.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_logreport
        """
        state = existing_state(self._config)
        if state is None or report.when != "teardown" or "llmload" not in report.keywords:
            return
        from pytest_llmload.host.hooks import finishing
        from pytest_llmload.host.run.log import RunLog

        if not state.settings.reports:
            return
        if self._worker:
            target = self._folder / f"{self._worker}{_SUFFIX}"
            temporary = target.with_suffix(".new")
            temporary.write_bytes(pickle.dumps(state.log))
            temporary.replace(target)
            return
        so_far = RunLog()
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            so_far.merge(pickle.loads(path.read_bytes()))
        finishing.write_so_far(state, so_far)
