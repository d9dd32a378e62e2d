"""The modules that are imported while a model is loaded: their time is part of the load's."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType


class _Watch(MetaPathFinder):
    """Finds no module, and keeps the names of those that were looked for."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        self.names[fullname] = None


@contextmanager
def imports_watched() -> Iterator[list[str]]:
    """Return a list that has, in the end, the modules that were imported meanwhile, sorted.

    To compare ``sys.modules`` before and after would touch the name of each module, and make a forked process copy a
    page for most of them: some 10 MB, in as many milliseconds.
    """
    watch = _Watch()
    late: list[str] = []
    sys.meta_path.insert(0, watch)
    try:
        yield late
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not watch]
        late += sorted(name for name in watch.names if name in sys.modules)
