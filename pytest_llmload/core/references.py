"""Import strings: ``package.module:name``, by which users name their functions and classes."""

from __future__ import annotations

import difflib
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from pytest_llmload.core.quoting import quoted


def is_reference(text: str) -> bool:
    """Return whether a text has the form ``package.module:name``, without looking for what it names."""
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*:\w+(\.\w+)*", text) is not None


#: What makes a module's names unknown to a reader of its source.
_DYNAMIC = re.compile(r"import \*|\bglobals\(\)|\bvars\(\)|\b__getattr__\b|\bsetattr\(|\bexec\(")


def absence(reference: str) -> str:
    """Return which part of ``package.module:name`` is not there, found without importing any of it.

    Empty if all is there, or if only the import can tell: a package outside files, a module that makes its names.
    """
    module, _, names = reference.partition(":")
    parts = module.split(".")
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    for depth in range(1, len(parts) + 1):
        found = ".".join(parts[:depth])
        spec = _spec(found, places)
        if spec is None:
            return f"there is no module {found!r}"
        # A module that is no package has no folders, and may have parts all the same: os.path.
        places = spec.submodule_search_locations or ()
    file = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    if file is None or file.suffix != ".py" or not file.is_file():
        return ""
    source = file.read_text(encoding="utf-8", errors="replace")
    name = names.partition(".")[0]
    if _DYNAMIC.search(source) or re.search(rf"\b{name}\b", source):
        return ""
    alike = difflib.get_close_matches(name, re.findall(r"^(?:async )?(?:def|class) (\w+)", source, re.MULTILINE), 1)
    return f"{file.name} has no {name!r}" + (f"; did you mean {module}:{alike[0]}?" if alike else "")


def _spec(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """Return where a module is: an imported one, or the one that the first finder knows in the given folders."""
    own = getattr(sys.modules.get(name), "__spec__", None)
    if isinstance(own, ModuleSpec):
        return own
    finders = (finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for find in finders if (spec := find(name, places, None)) is not None), None)


def resolve(reference: str) -> Any:
    """Return the object that ``package.module:name`` names.

    Raises ValueError if the text does not have that form, ImportError or AttributeError if nothing is there.
    """
    if not is_reference(reference):
        raise ValueError(f"{quoted(reference)} is not an import string; write 'package.module:name'")
    return pkgutil.resolve_name(reference)
