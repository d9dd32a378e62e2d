"""Import strings: ``package.module:name``, by which users name their functions and classes."""

from __future__ import annotations

import pkgutil
import re
from typing import Any

from pytest_llmload.core.quoting import quoted


def is_reference(text: str) -> bool:
    """Return whether a text has the form ``package.module:name``, without looking for what it names."""
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*:\w+(\.\w+)*", text) is not None


def resolve(reference: str) -> Any:
    """Return the object that ``package.module:name`` names.

    Raises ValueError if the text does not have that form, ImportError or AttributeError if nothing is there.
    """
    if not is_reference(reference):
        raise ValueError(f"{quoted(reference)} is not an import string; write 'package.module:name'")
    return pkgutil.resolve_name(reference)
