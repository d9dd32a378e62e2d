"""Import all measuring code that needs torch: before a load is timed, and once in the warm server."""

from pytest_llmload.probes.builtin import probes_for
from pytest_llmload.process import calls, environment, kernel_warm_up, model_changes
from pytest_llmload.worker import checks
from pytest_llmload.worker.model import generation, loaded, loading, tensors

__all__ = [
    "calls",
    "checks",
    "environment",
    "generation",
    "kernel_warm_up",
    "loaded",
    "loading",
    "model_changes",
    "probes_for",
    "tensors",
]
