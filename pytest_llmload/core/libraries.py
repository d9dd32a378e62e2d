"""The modules that loading a model imports; a load's process imports them before it starts to measure."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

#: Modules that ``from_pretrained`` and ``generate`` import on their first call.
LIBRARY = (
    "torch",
    "safetensors.torch",
    "accelerate",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.generation.utils",
    "transformers.integrations.accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
#: Modules that place weights by device maps, and on disk.
PLACEMENT = ("psutil", "numpy.ctypeslib", "resource")


@functools.cache
def auto_classes() -> tuple[str, ...]:
    """Return the names of the installed transformers' auto classes, read from its source without importing it.

    Empty where it is not installed here: a different interpreter may load.
    """
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations or []) if spec is not None else []
    files = [Path(place, "models", "auto", "modeling_auto.py") for place in places]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return tuple(name for text in texts for name in re.findall(r"^class (Auto\w+)", text, re.MULTILINE))


def is_installed(name: str) -> bool:
    """Return true if a module can be found, without importing it; its parent is imported, and may be missing too."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
