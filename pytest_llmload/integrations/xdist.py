"""pytest-xdist: give the tests of one load to one worker, and collect what the workers saw in one report."""

from __future__ import annotations

import json
import pickle
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmload.host.run.stash import existing_state

if TYPE_CHECKING:
    from pytest_llmload.host.loads.progress import Display
    from pytest_llmload.integrations.xdist_progress import Watcher
    from pytest_llmload.system.scratch import Scratch

_FOLDER = "llmload_folder"
_OUTPUT = "llmload"


class Integration:
    """The plugin of the controller and of each worker; each uses its own half of the hooks."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._temporary: Scratch | None = None
        self._watcher: Watcher | None = None
        given: Any = config
        if hasattr(config, "workerinput"):
            self._report_as_it_goes(Path(given.workerinput[_FOLDER]), given.workerinput["workerid"])
            from pytest_llmload.host.run.display import DISPLAY

            config.stash[DISPLAY] = self._display

    def _report_as_it_goes(self, folder: Path, worker: str = "") -> None:
        from pytest_llmload.integrations.xdist_report import RunningReport

        self._config.pluginmanager.register(RunningReport(self._config, folder, worker), "llmload-xdist-report")

    def _display(self) -> Display:
        from pytest_llmload.integrations.xdist_progress import WorkerDisplay

        given: Any = self._config
        return WorkerDisplay(Path(given.workerinput[_FOLDER]), given.workerinput["workerid"])

    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker the folder in which it writes the load of each test.

        https://pytest-xdist.readthedocs.io/en/stable/how-to.html (src/xdist/newhooks.py describes the hooks)
        """
        if self._temporary is None:
            from pytest_llmload.system.scratch import XDIST, Scratch

            self._temporary = Scratch(XDIST)
            self._report_as_it_goes(self._temporary.files)
        node.workerinput[_FOLDER] = str(self._temporary.files)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Return the scheduler that keeps the tests of one load together, for ``--dist load``."""
        # Any other mode that the user chooses (loadscope, loadgroup, each …) is left unchanged.
        if config.getvalue("dist") == "load" and self._temporary is not None:
            from pytest_llmload.integrations.xdist_scheduling import ByLoad

            return ByLoad(config, log, self._temporary.files)
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """In a worker, write the load of each test, before the worker gets its first test.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_collection_finish
        """
        workerinput = getattr(self._config, "workerinput", None)
        state = existing_state(self._config)
        if workerinput is None or state is None:
            return
        specs = ((item.nodeid, state.spec_of(item)) for item in session.items)
        groups = {nodeid: spec.id for nodeid, spec in specs if spec is not None}
        target = Path(workerinput[_FOLDER], f"{workerinput['workerid']}.json")
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(groups))
        temporary.replace(target)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """In a worker, send the log of its loads to the controller.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_sessionfinish
        """
        output = getattr(self._config, "workeroutput", None)
        state = existing_state(self._config)
        if output is not None and state is not None:
            state.log.cold_reason = state.broker.cold_reason
            output[_OUTPUT] = pickle.dumps(state.log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """In the controller, merge the log of a worker that has ended."""
        data = getattr(node, "workeroutput", {}).get(_OUTPUT)
        if data is not None:
            from pytest_llmload.host.run.stash import state_of

            state_of(self._config).log.merge(pickle.loads(data))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        """In the controller, raise UsageError after the run if the markers have mistakes.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtestloop
        """
        if self._temporary is not None and existing_state(self._config) is not None:
            from pytest_llmload.integrations.xdist_progress import Watcher

            self._watcher = Watcher(self._config, self._temporary.files)
        result = yield
        state = existing_state(self._config)
        if state is not None and not state.is_worker:
            state.refuse_mistakes()
        return result

    def pytest_unconfigure(self) -> None:
        """Remove the folder that the workers share.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_unconfigure
        """
        if self._watcher is not None:
            self._watcher.close()
        if self._temporary is not None:
            self._temporary.close()
