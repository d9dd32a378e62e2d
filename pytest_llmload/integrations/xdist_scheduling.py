"""How pytest-xdist hands out tests: all of one load to one worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class ByLoad(LoadScopeScheduling):  # type: ignore[misc]
    """One scope per load; tests without a load are scopes of their own, as under ``--dist load``."""

    def __init__(self, config: pytest.Config, log: Any, folder: Path) -> None:
        super().__init__(config, log)
        self._folder = folder
        self._groups: dict[str, str] | None = None

    def _split_scope(self, nodeid: str) -> str:
        if self._groups is None:
            self._groups = {}
            for file in sorted(self._folder.glob("*.json")):
                self._groups.update(json.loads(file.read_text()))
        return self._groups.get(nodeid, nodeid)
