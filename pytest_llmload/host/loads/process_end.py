"""The end of a load's process, which overlaps with the next load where no figure sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.processes import LoadProcess

if TYPE_CHECKING:
    from pytest_llmload.host.loads.gpu_leases import Lease
    from pytest_llmload.host.loads.inline import InlineProcess

#: Largest share of a GPU that a process may take whose end the next load does not wait for.
_ENDING = 0.5


class ProcessEnd:
    """Ends the processes of a run's loads; at most one of them is still ending while the next load begins."""

    def __init__(self) -> None:
        #: A process that was told to end while the next one is ready; None once it was waited for.
        self._ending: LoadProcess | None = None

    @property
    def pids(self) -> set[int]:
        """Return the process id of the process that is ending, if there is one."""
        return {self._ending.pid} if self._ending is not None else set()

    def end(self, process: LoadProcess | InlineProcess, held: Lease, *, next_is_ready: bool) -> None:
        """End the process of a load, and give its GPUs back.

        While the next load's process is ready, it is not waited for: the kernel needs a while to take its memory apart,
        which is in no figure of the next load. No load that is timed has its process made ready.
        """
        later: LoadProcess | None = None
        try:
            self.wait()
            if next_is_ready and isinstance(process, LoadProcess) and process.alive:
                fits = all(hardware.used_by(gpu, process.pid) <= _ENDING * gpu.total for gpu in held.gpus)
                later = process if fits else None
        finally:
            try:
                if later is not None:
                    later.hang_up()
                else:
                    process.close()
                self._ending = later
            finally:
                # Also after Ctrl-C or pytest-timeout, which leave no process that could use the GPUs.
                held.release()

    def wait(self) -> None:
        """Wait for the process that was told to end, if there is one."""
        if self._ending is not None:
            self._ending.close()
            self._ending = None
