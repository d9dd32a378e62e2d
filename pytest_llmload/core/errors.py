"""Every error a test or a run can end with.

FAILED means that the model or the libraries moved: :class:`LoadError` and the assertion errors.
ERROR means that the machine, the setup or this plugin did: :class:`MachineError`, :class:`BaselineError` and
:class:`CheckRaised`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmload.core.results import LoadResult


class LoadError(Exception):
    """A load that did not end in a usable model; ``result`` holds what was seen until then."""

    def __init__(self, message: str, result: LoadResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class LoadFailed(LoadError):
    """The loading code raised an exception."""


class LoadOutOfMemory(LoadError):
    """The load ran out of GPU or host memory."""


class LoadCrashed(LoadError):
    """The load's process died: a signal, or an exit that nobody asked for."""


class LoadTimeout(LoadError):
    """The load took longer than ``--llm-timeout`` and was killed."""


class StrategyNotApplied(LoadError, AssertionError):
    """The model that was loaded is not the one that was asked for."""


class MemoryRegressed(AssertionError):
    """Memory, loading work or the manifest differ from the baseline by more than the tolerance."""


class LatencyRegressed(AssertionError):
    """Load time, time to first token or time per token differ from the baseline."""


class BaselineMissing(AssertionError):
    """There is no baseline for this load; the message holds the command that records one."""


class BaselineIncomparable(AssertionError):
    """The baseline belongs to another model shape, spec or workload."""


class CeilingExceeded(AssertionError):
    """More memory than ``memory_ceiling`` allows."""


class BudgetExceeded(AssertionError):
    """More time than ``latency_budget`` allows."""


class MachineError(Exception):
    """The machine cannot do what was asked: GPU held, download failed, disk full, driver mismatch."""


class CheckRaised(Exception):
    """A check or a probe of pytest-llmload raised: its own fault, which says nothing about the load."""


class BaselineError(Exception):
    """A baseline file that cannot be read or written: truncated, of a newer schema, read-only."""


class ReportError(Exception):
    """A report that cannot be read: damaged, of a newer schema, or not a report."""


class RemoteError(Exception):
    """An exception from the load's process whose class is not known in the pytest process.

    ``type_name`` is its qualified class name, ``traceback`` the text of its remote traceback.
    """

    def __init__(self, message: str, type_name: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        self.traceback = traceback

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.type_name, str(self.args[0])) if part)
        return f"{head}\n\n{self.traceback}" if self.traceback else head


for _name, _class in list(globals().items()):
    # As users import them and as pytest prints them: pytest_llmload.MemoryRegressed.
    if isinstance(_class, type) and issubclass(_class, Exception):
        _class.__module__ = "pytest_llmload"
