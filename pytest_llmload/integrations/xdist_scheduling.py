"""Let pytest-xdist give all tests of one load to one worker."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScheduling


class ByLoad(LoadScheduling):  # type: ignore[misc]
    """``--dist load`` whose portions never end between two tests of one load; tests without loads are not affected."""

    def __init__(self, config: pytest.Config, log: Any, folder: Path) -> None:
        super().__init__(config, log)
        self._folder = folder

    @cached_property
    def _groups(self) -> dict[str, str]:
        """Return node id -> load; every worker has written these files before it gets its first test."""
        groups: dict[str, str] = {}
        for file in sorted(self._folder.glob("*.json")):
            groups.update(json.loads(file.read_text()))
        return groups

    def _send_tests(self, node: Any, num: int) -> None:
        # The tests of a load are adjacent, and so are the remaining ones after their worker has crashed.
        while 0 < num < len(self.pending) and self._load_of(num - 1) == self._load_of(num) != "":
            num += 1
        super()._send_tests(node, num)

    def _load_of(self, position: int) -> str:
        return self._groups.get(self.collection[self.pending[position]], "")
