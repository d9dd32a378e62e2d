"""Model-loading regression tests for LLMs, as a pytest plugin.

Public names are imported on first use, so that merely installing the plugin does not slow pytest down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_llmload.core.errors import (
        BaselineError,
        BaselineIncomparable,
        BaselineMissing,
        BudgetExceeded,
        CeilingExceeded,
        CheckRaised,
        LatencyRegressed,
        LLMLoadError,
        LoadCrashed,
        LoadError,
        LoadFailed,
        LoadOutOfMemory,
        LoadTimeout,
        MachineError,
        MemoryRegressed,
        RemoteError,
        ReportError,
        StrategyNotApplied,
    )
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.checks.baselines import LatencyBaseline, MemoryBaseline
    from pytest_llmload.host.loads.llm import LLM

    __version__: str

_HOMES = {
    "LLM": "host.loads.llm",
    "LatencyBaseline": "host.checks.baselines",
    "LoadResult": "core.results",
    "LoadSpec": "core.spec",
    "MemoryBaseline": "host.checks.baselines",
}

__all__ = [
    "LLM",
    "BaselineError",
    "BaselineIncomparable",
    "BaselineMissing",
    "BudgetExceeded",
    "CeilingExceeded",
    "CheckRaised",
    "LLMLoadError",
    "LatencyBaseline",
    "LatencyRegressed",
    "LoadCrashed",
    "LoadError",
    "LoadFailed",
    "LoadOutOfMemory",
    "LoadResult",
    "LoadSpec",
    "LoadTimeout",
    "MachineError",
    "MemoryBaseline",
    "MemoryRegressed",
    "RemoteError",
    "ReportError",
    "StrategyNotApplied",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pytest-llmload")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'core.errors')}"), name)


def __dir__() -> list[str]:
    return __all__
