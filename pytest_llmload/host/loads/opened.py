"""A loaded model that is kept for its tests: its process, and the GPUs that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmload.host.loads.gpu_leases import Lease
    from pytest_llmload.host.loads.inline import InlineProcess
    from pytest_llmload.host.loads.processes import LoadProcess


class Opened:
    """A process with a model. The load that requested it closes it, or the broker, if another load needs the device."""

    def __init__(self, process: LoadProcess | InlineProcess, held: Lease, end: Callable[[], None]) -> None:
        """Keep a process and its GPUs; ``end`` ends the one and gives the others back."""
        self.process = process
        self._held: Lease | None = held
        self._end = end

    @property
    def is_alive(self) -> bool:
        """Return True while the process answers."""
        return self._held is not None and self.process.alive

    def close(self) -> None:
        """End the process and give the GPUs back. May be called twice."""
        if self._held is not None:
            self._held = None
            self._end()
