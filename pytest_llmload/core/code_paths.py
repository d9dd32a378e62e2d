"""Name files of code without the folders of this machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

#: The folders that packages are installed in: pip's, and that of Debian's own Python.
INSTALLED = ("/site-packages/", "/dist-packages/")
_OWN = "/pytest_llmload/"


@cache
def short_path(file: str) -> str:
    """Return a file's path from its package on, else its name with its folder, so that no path of the machine shows.

    Files of this package are named from it on wherever it is, as in an editable install.
    """
    for folder in INSTALLED:
        _, installed, rest = file.rpartition(folder)
        if installed:
            return rest
    _, own, rest = file.rpartition(_OWN)
    return f"{_OWN[1:]}{rest}" if own else "/".join(Path(file).parts[-2:])
