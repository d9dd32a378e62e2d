"""Where another integration shows the progress of this process's loads; apart, so that it imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmload.host.loads.progress import Display

#: Makes what shows the progress where that is not a terminal: a worker of pytest-xdist has none.
DISPLAY: pytest.StashKey[Callable[[], Display]] = pytest.StashKey()
