"""The measuring code that needs torch, as one import: before a load's clock starts, and once in the warm server."""

from pytest_llmload.worker import applied, calls, environment, fingerprint, generation, loaded, page_cache, tensors

__all__ = ["applied", "calls", "environment", "fingerprint", "generation", "loaded", "page_cache", "tensors"]
