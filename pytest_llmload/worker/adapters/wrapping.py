"""What an adapter library put around a model: which modules are its own, and what the others were called before.

PEFT replaces ``q_proj`` by a layer of its own that holds the original as ``q_proj.base_layer`` and the adapter beside
it, keeps trained copies of whole modules under ``modules_to_save``, and may put a ``PeftModel`` around everything
(peft/tuners/tuners_utils.py, ``BaseTunerLayer``; peft/utils/other.py, ``AuxiliaryTrainingWrapper``). The checks of the
model itself go by the names that its own code and its checkpoint use.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

#: The child of a wrapper that is the wrapped module itself.
_TUNED, _SAVED = "base_layer", "original_module"


class Wrapping:
    """The wrappers among a model's modules; nothing is one where peft was never imported."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        #: Path -> PEFT's layer around a module that the adapter tunes.
        self.tuned: dict[str, Any] = _instances(modules, "peft.tuners.tuners_utils", "BaseTunerLayer")
        tuners = _instances(modules, "peft.tuners.tuners_utils", "BaseTuner")
        saved = _instances(modules, "peft.utils.other", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper")
        #: Path -> PEFT's wrapper around a module of which the adapter has a copy of its own.
        self.saved: dict[str, Any] = {path: module for path, module in saved.items() if path not in self.tuned}
        root = _instances({"": modules[""]}, "peft.peft_model", "PeftModel")
        kept = {**dict.fromkeys(self.saved, _SAVED), **dict.fromkeys(self.tuned, _TUNED)}
        self._base: dict[str, str | None] = {}
        for path in modules:
            parent, _, leaf = path.rpartition(".")
            if not path:
                self._base[path] = None if root or path in tuners else ""
            elif parent in kept:
                self._base[path] = self._base[parent] if leaf == kept[parent] else None
            elif (parent in tuners and leaf == "model") or (root and not tuners and path == "base_model"):
                # The model as it was before: below a tuner, or, with a prompt that is learned, below the PeftModel.
                self._base[path] = ""
            else:
                above = self._base[parent]
                self._base[path] = None if above is None else f"{above}.{leaf}" if above else leaf

    def base_module(self, path: str) -> str | None:
        """The path of a module in the model without the adapter; None for the adapter's own modules."""
        return self._base[path]

    def owner(self, path: str) -> str | None:
        """As :func:`base_module`, for the module that owns a tensor: what a wrapper itself owns is the adapter's."""
        return None if path in self.tuned or path in self.saved else self._base[path]

    @property
    def layers(self) -> dict[str, Any]:
        """Every wrapper, by path."""
        return {**self.tuned, **self.saved}


def _instances(modules: Mapping[str, Any], source: str, *names: str) -> dict[str, Any]:
    """The modules of the classes that ``source`` defines; names that this version of peft lacks are passed over."""
    found = sys.modules.get(source)
    classes = tuple(getattr(found, name) for name in names if hasattr(found, name))
    return {path: module for path, module in modules.items() if classes and isinstance(module, classes)}
