"""The built-in methods, in the order of the documentation. Importing them imports no torch."""

from __future__ import annotations

from pytest_llmload.quantisation.base import Method
from pytest_llmload.quantisation.bitsandbytes import BitsAndBytes

BUILTIN: tuple[type[Method], ...] = (BitsAndBytes,)
