"""The measuring code that needs torch, as one import: before a load's clock starts, and once in the warm server."""

from pytest_llmload.process import calls, environment, model_changes
from pytest_llmload.system import page_cache
from pytest_llmload.worker import checks
from pytest_llmload.worker.model import generation, loaded, tensors

__all__ = ["calls", "checks", "environment", "generation", "loaded", "model_changes", "page_cache", "tensors"]
