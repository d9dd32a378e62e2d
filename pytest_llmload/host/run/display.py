"""The stash key by which an integration shows the progress of this process's loads; separate, to import nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_llmload.host.loads.progress import Display

#: Makes the display of the progress if there is no terminal, as in a worker of pytest-xdist.
DISPLAY: pytest.StashKey[Callable[[], Display]] = pytest.StashKey()
