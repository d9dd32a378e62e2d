"""The modules that loading a model imports; a load's process imports them before it starts to measure."""

from __future__ import annotations

import importlib.util

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


def is_installed(name: str) -> bool:
    """Return true if a module can be found, without importing it; its parent is imported, and may be missing too."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
