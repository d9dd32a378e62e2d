"""One file per way of loading. ``from pytest_llmload.strategies import Strategy`` to write one of your own."""

from pytest_llmload.strategies.base import Refused, Strategy

__all__ = ["Refused", "Strategy"]
