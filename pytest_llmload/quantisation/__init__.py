"""One file per quantisation method. ``from pytest_llmload.quantisation import Method`` to write one of your own."""

from pytest_llmload.quantisation.base import FileFormat, Method, Request, Scheme, ServeFlag, Stored

__all__ = ["FileFormat", "Method", "Request", "Scheme", "ServeFlag", "Stored"]
