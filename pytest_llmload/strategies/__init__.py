"""One file for each way of loading. Import ``Strategy`` from here to write your own."""

from pytest_llmload.strategies.base import Refused, Strategy

__all__ = ["Refused", "Strategy"]
