"""Find the modules that an adapter library has put around a model, and the original names of the others.

PEFT replaces ``q_proj`` by a layer of its own, which holds the original as ``q_proj.base_layer`` next to the adapter,
keeps trained copies of whole modules under ``modules_to_save``, and may put a ``PeftModel`` around everything. The
checks of the model itself use the names in its own code and its checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

#: Names of a PEFT module's child that the module was put around (peft/tuners/tuners_utils.py, ``BaseTunerLayer``
#: and ``BaseTuner``; peft/utils/other.py, ``AuxiliaryTrainingWrapper``; peft/peft_model.py, ``PeftModel``).
_AROUND = ("base_layer", "original_module", "model", "base_model")


class Wrapping:
    """The modules of PEFT among a model's modules; there are none if peft was never imported."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        #: Path -> every module whose class PEFT defines, outermost first.
        self.own: dict[str, Any] = {
            path: module for path, module in modules.items() if "peft" in sys.modules and _is_of_peft(type(module))
        }
        #: Path -> PEFT's layer around a module that the adapter tunes.
        self.tuned = self._of_kind("peft.tuners.tuners_utils", "BaseTunerLayer")
        #: Path -> PEFT's wrapper around a module of which the adapter has its own copy.
        self.saved = self._of_kind("peft.utils.other", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper")
        self._base: dict[str, str | None] = {}
        for path, module in modules.items():
            self._base[path] = self._place(path, module)

    def _of_kind(self, source: str, *names: str) -> dict[str, Any]:
        """Return the modules of the classes that ``source`` defines; names that this peft lacks are skipped."""
        found = sys.modules.get(source)
        classes = tuple(getattr(found, name) for name in names if hasattr(found, name))
        return {path: module for path, module in self.own.items() if classes and isinstance(module, classes)}

    def _place(self, path: str, module: Any) -> str | None:
        parent, _, leaf = path.rpartition(".")
        if not path:
            return ""
        above = self._base[parent]
        if parent in self.own:
            # A layer within a wrapper (peft/tuners/trainable_tokens) has the wrapper's place in the model.
            around = leaf in _AROUND or (path in self.own and not module._modules.keys().isdisjoint(_AROUND))
            return above if around else None
        return None if above is None else f"{above}.{leaf}" if above else leaf

    def base_module(self, path: str) -> str | None:
        """Return the path of a module in the model without the adapter; None for the adapter's own modules."""
        return self._base[path]

    def owner(self, path: str) -> str | None:
        """Return :func:`base_module` of a module that owns a tensor; None also if that is a wrapper of PEFT."""
        return None if path in self.own else self._base[path]

    @property
    def layers(self) -> dict[str, Any]:
        """Return every wrapper of a single module, by path."""
        return {**self.tuned, **self.saved}


def _is_of_peft(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)
