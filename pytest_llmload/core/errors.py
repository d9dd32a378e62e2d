"""Every error that a test or a run can end with. Their common base is :class:`LLMLoadError`.

FAILED means that the model or the libraries changed: :class:`LoadError` and the assertion errors.
ERROR means that the machine, the setup or this plugin is at fault: :class:`MachineError`, :class:`BaselineError` and
:class:`CheckRaised`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llmload.core.results import LoadResult


class LLMLoadError(Exception):
    """The base class of every error that pytest-llmload raises in a test or a run."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            # As users import it and as pytest prints it: pytest_llmload.MemoryRegressed.
            cls.__module__ = "pytest_llmload"


LLMLoadError.__module__ = "pytest_llmload"


class LoadError(LLMLoadError):
    """A load that did not end in a usable model; ``result`` holds the figures taken before it ended."""

    def __init__(self, message: str, result: LoadResult | None = None) -> None:
        super().__init__(message)
        self.result = result


class LoadFailed(LoadError):
    """The loading code raised an exception."""


class LoadOutOfMemory(LoadError):
    """The load ran out of GPU or host memory."""


class LoadCrashed(LoadError):
    """The load's process died: a signal, or an unexpected exit."""


class LoadTimeout(LoadError):
    """The load took longer than ``--llm-timeout`` and was killed."""


class StrategyNotApplied(LoadError, AssertionError):
    """The loaded model is not the model that the test requested."""


class MemoryRegressed(LLMLoadError, AssertionError):
    """Memory, loading work or the manifest differ from the baseline by more than the tolerance."""


class LatencyRegressed(LLMLoadError, AssertionError):
    """Load time, time to first token or time per token differ from the baseline."""


class BaselineMissing(LLMLoadError, AssertionError):
    """The load has no baseline; the message holds the command that records one."""


class BaselineIncomparable(LLMLoadError, AssertionError):
    """The baseline belongs to a different model shape, spec or workload."""


class CeilingExceeded(LLMLoadError, AssertionError):
    """The load needed more memory than ``memory_ceiling`` allows."""


class BudgetExceeded(LLMLoadError, AssertionError):
    """The load took more time than ``latency_budget`` allows."""


class MachineError(LLMLoadError):
    """The machine cannot do what the test requests: GPU held, download failed, disk full, driver mismatch."""


class RequirementMissing(MachineError):
    """The machine lacks a package or a device that the library needs for the load: the test is skipped."""


#: The name of each class of machine errors in messages between processes.
MACHINE_ERRORS: dict[str, type[MachineError]] = {"machine": MachineError, "missing": RequirementMissing}


class CheckRaised(LLMLoadError):
    """A check or a probe raised an exception: a fault of the check or probe, which says nothing about the load."""


class BaselineError(LLMLoadError):
    """A baseline file that cannot be read or written: it is truncated, has a newer schema, or is read-only."""


class ReportError(LLMLoadError):
    """A report that cannot be read: it is damaged, has a newer schema, or is not a report."""


class RemoteError(LLMLoadError):
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
