"""Real servers: only where their environments are, which ``make test-servers`` builds and names."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "worker"))
sys.path.append(str(Path(__file__).parent))

#: Minutes of installation do not belong into ``make test``.
collect_ignore_glob = [] if os.environ.get("LLMLOAD_SERVERS") else ["test_*.py"]


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, checkpoint_cache: Path) -> Iterator[Callable[[str], object]]:
    """Give a server of a kind, started when it is first asked for and shared by all tests."""
    from real_servers import Real, Servers

    servers = Servers(tmp_path_factory.mktemp("servers"), checkpoint_cache)
    started: dict[str, Real] = {}

    def get(name: str) -> Real:
        if name not in started:
            started[name] = servers.start(name)
        return started[name]

    yield get
    for server in reversed(started.values()):
        server.stop()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, checkpoint_cache: Path) -> object:
    """Start servers that a test ends itself."""
    from real_servers import Servers

    return Servers(tmp_path_factory.mktemp("own"), checkpoint_cache)
