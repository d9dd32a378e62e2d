"""Real servers: only where their environments are, which ``make test-servers`` builds and names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from real_servers import Servers, Shared

sys.path.append(str(Path(__file__).parents[1] / "worker"))
sys.path.append(str(Path(__file__).parent))

#: Minutes of installation do not belong into ``make test``.
collect_ignore_glob = [] if os.environ.get("LLMLOAD_SERVERS") else ["test_*.py"]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, checkpoint_cache: Path) -> Servers:
    """Start servers that a test ends itself."""
    from real_servers import Servers

    from pytest_llmload.worker.checkpoints.resolve import resolve

    return Servers(tmp_path_factory.mktemp("servers"), Path(resolve("random:tiny-llama", checkpoint_cache).path))


@pytest.fixture(scope="session")
def running(servers: Servers) -> Iterator[Shared]:
    """Give a server of a kind, started when it is first asked for and shared by all tests."""
    from real_servers import Shared

    shared = Shared(servers, {})
    yield shared
    shared.stop()


@pytest.fixture(scope="session")
def smaller(servers: Servers) -> Iterator[Shared]:
    """Give another server of a kind, which needs a key and has a smaller context or cache; shared as well."""
    from real_servers import SMALLER, Shared

    shared = Shared(servers, SMALLER)
    yield shared
    shared.stop()
