"""Describe the differences between the settings of two models, in one sentence per field."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_llmload.baselines.environment import differing
from pytest_llmload.core.environment_entries import QUANTISERS
from pytest_llmload.core.verdicts import ManifestChange

#: Libraries whose releases add fields and constants, and take them away.
_LIBRARIES = ("transformers", "torch", *QUANTISERS, "peft", "accelerate")
#: Fields that pytest-llmload defines: every load has them, with any release of the libraries.
_OWN = ("attention", "mode.", "cache.", "files")
#: Fields of the configs. Constants of classes follow from them: a library that uses a different class for the model
#: also uses that class's constants.
_CONFIG = ("config.", "generation.")
#: How a field is shown that is not set.
_NONE = "none"


def diff(
    old: Mapping[str, str],
    new: Mapping[str, str],
    old_environment: Mapping[str, str],
    new_environment: Mapping[str, str],
) -> tuple[ManifestChange, ...]:
    """Return every field that differs; none if one side lacks settings, as a served model does.

    A field that only one side has counts only if the libraries are the same: their releases add and remove fields.
    """
    if not old or not new:
        return ()
    same = not differing(old_environment, new_environment, _LIBRARIES)
    names = [name for name in sorted({**old, **new}, key=_order) if old.get(name) != new.get(name)]
    return tuple(
        ManifestChange(f"{name}: {_value(old, name)} -> {_value(new, name)}", 0, 0)
        for name in names
        if same or (name in old and name in new) or name.startswith(_OWN)
    )


def _value(settings: Mapping[str, str], name: str) -> str:
    """Return the text of a field; one whose text is that of a field that is not set is quoted."""
    value = settings.get(name, _NONE)
    return repr(value) if name in settings and value == _NONE and not name.startswith(_OWN) else value


def _order(name: str) -> tuple[int, str]:
    """Sort the fields of pytest-llmload first, then the configs, then constants of classes, which follow from them."""
    return (0 if name.startswith(_OWN) else 1 if name.startswith(_CONFIG) else 2, name)
