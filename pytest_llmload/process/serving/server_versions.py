"""Find the versions of the libraries that a started server's processes use and that their figures depend on."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.utils import canonicalize_name

from pytest_llmload.core.environment_entries import ENTRIES, VERSION
from pytest_llmload.quantisation.registry import methods
from pytest_llmload.system.process_tree import tree

_PROC = Path("/proc")
_PACKAGES = re.compile(r"/\S*/python(\d+\.\d+)/(?:site|dist)-packages(?=/)")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)


def versions(root: int) -> dict[str, str]:
    """Return the versions of Python and of each library whose version is an entry of an environment.

    The package folders are those that a process of the tree has mapped files from, since a server may have a different
    interpreter and different libraries from the load's process.
    """
    found: dict[str, str] = {}
    names = {entry.name for entry in ENTRIES.values() if entry.kind == VERSION}
    names |= {package for method in methods() for package in method.packages}
    entries = {canonicalize_name(name): name for name in names}
    for python, folder in sorted(_folders(root)):
        found.setdefault("python", python)
        for distribution in importlib.metadata.distributions(path=[folder]):
            name = canonicalize_name(str(distribution.metadata["Name"]))
            if name in entries:
                found.setdefault(entries[name], distribution.version)
    return found


def _folders(root: int) -> set[tuple[str, str]]:
    """Return each package folder that the tree uses, with its version of Python."""
    found = set()
    for pid in tree(root):
        try:
            text = (_PROC / str(pid) / "maps").read_text(encoding="utf-8", errors="replace")
        except _GONE:
            continue
        found |= {(match[1], match[0]) for match in _PACKAGES.finditer(text)}
    return found
