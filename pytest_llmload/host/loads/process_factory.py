"""The start of the processes of a run's loads: forks of a warm server, or with exec where that does not serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llmload.core.errors import MachineError
from pytest_llmload.host.loads.inline import InlineProcess
from pytest_llmload.host.loads.preloaded_modules import base
from pytest_llmload.host.loads.processes import LoadProcess, fork, start_cold
from pytest_llmload.host.loads.warm_server import WarmServer, variables
from pytest_llmload.system.scratch import LOGS, Scratch

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec

#: Variables that pytest changes between tests and that loads do not read.
_VOLATILE = ("PYTEST_CURRENT_TEST",)


class ProcessFactory:
    """Starts processes, and the warm server that forks them; owns the folder of their logs."""

    def __init__(
        self,
        inline: bool,
        imports: Callable[[LoadSpec], Sequence[str]],
        gpu_answers: Callable[[], dict[str, object] | None],
        end_loads: Callable[[], None],
    ) -> None:
        """Prepare for a run whose loads stay in the pytest process if ``inline``.

        ``imports`` returns the modules that the server imports before its first fork, for a load and all expected
        ones; ``gpu_answers`` what libraries are answered that ask for a GPU while they are imported, or None.
        ``end_loads`` ends what the server has forked, before it is closed.
        """
        self._inline = inline
        self._imports = imports
        self._gpu_answers = gpu_answers
        self._end_loads = end_loads
        self._server: WarmServer | None = None
        self._server_env: dict[str, str] = {}
        #: True once the server was asked to import what this run's own loads need.
        self._is_warm = False
        self._folder: Scratch | None = None
        self._logs = 0
        #: Why loads start with exec although they could fork; None while they fork.
        self.cold_reason: str | None = None

    def start(self, spec: LoadSpec) -> LoadProcess | InlineProcess:
        """Return a process for a load: forked from the warm server, or with exec if its environment differs."""
        if self._inline:
            return InlineProcess()
        env = self._variables(spec)
        log = self._log(spec.slug)
        self._start_server()
        if self._server is not None and env == self._server_env:
            if not self._is_warm:
                self._server.warm_up(self._imports(spec), self._gpu_answers())
                self._is_warm = True
            try:
                process = fork(self._server, log)
            except MachineError:
                self.end_server()
                raise
            if isinstance(process, LoadProcess):
                return process
            self.cold_reason = process
            self.end_server()
        return start_cold(log, env)

    def start_for_files(self) -> LoadProcess:
        """Return a process that examines, builds or downloads; the server imports libraries meanwhile."""
        self._start_server()
        return start_cold(self._log("resolve"), self._variables(None))

    def start_elsewhere(self, spec: LoadSpec, further: dict[str, str]) -> LoadProcess:
        """Return a process with further environment variables, such as those of a different revision's code."""
        return start_cold(self._log("base"), {**self._variables(spec), **further})

    def forks(self, spec: LoadSpec) -> bool:
        """Return whether a load's process can be forked from the server, which runs."""
        return self._server is not None and self._variables(spec) == self._server_env

    def fork_spare(self) -> LoadProcess | str:
        """Return a process that the running server has forked; or, as text, why it may not fork any more."""
        assert self._server is not None
        return fork(self._server, self._log("spare"))

    def end_server(self) -> None:
        """End every load, then the warm server. A load that is used again reopens."""
        self._end_loads()
        if self._server is not None:
            self._server.close()
            self._server = None

    def close(self) -> None:
        """End every process, and remove the logs."""
        self.end_server()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def _variables(self, spec: LoadSpec | None) -> dict[str, str]:
        """Return the environment variables of a load's process; without a spec, of the server and the downloads."""
        env = variables({name: value for name, value in os.environ.items() if name not in _VOLATILE})
        if spec is not None:
            env.update(dict(spec.env))
        return env

    def _start_server(self) -> None:
        """Start the warm server, which imports what every load needs, unless it runs or loads cannot be forked."""
        if self._server is not None and self._server.exit_status is not None:
            # The server was killed while it waited, perhaps for its memory: fork the next loads from a new server.
            self.end_server()
        if self._server is not None or self.cold_reason is not None or self._inline:
            return
        self._server_env = self._variables(None)
        self._server, self._is_warm = WarmServer(self._log("server"), self._server_env), False
        self._server.warm_up(base(), self._gpu_answers())

    def _log(self, name: str) -> Path:
        if self._folder is None:
            self._folder = Scratch(LOGS)
        self._logs += 1
        return self._folder.files / f"{self._logs:03d}-{name}.log"
