"""torch elastic's agent, in a thread: it starts the ranks, watches them, and reports how one ended."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

from pytest_llmload.process.ranks import rank
from pytest_llmload.process.server_imports import answering
from pytest_llmload.system.nodes import nodes
from pytest_llmload.worker.parallel.world import STORE

#: Seconds in which the other ranks must end after one of them has died.
_SHUTDOWN = 2
#: Seconds that a machine waits for the others to join, as torch's own default.
_RENDEZVOUS = 900


class Agent:
    """Starts the ranks of this machine by forking, so that they have imported all that this process has.

    On one machine they meet through a file of this load, so that none of them listens on the network: torch's own
    store listens on all interfaces, and what the agents write to it is unpickled. On several machines,
    torchrun's variables name the rendezvous: PET_NNODES, PET_RDZV_ENDPOINT, PET_RDZV_ID and PET_RDZV_BACKEND, as
    ``torchrun --nnodes … --rdzv-endpoint …`` reads them.
    """

    def __init__(self, size: int, pairs: list[tuple[socket.socket, socket.socket]], logs: Path) -> None:
        self._logs = logs
        #: Local rank -> exit status (or minus the signal's number) of the rank whose end torch elastic saw first.
        self.failures: dict[int, int] = {}
        #: The exception of the agent itself, if it failed.
        self.error: Exception | None = None
        self._launch = self._launcher(size)
        arguments = (os.getpid(), pairs, logs)
        # The kernel kills ranks when the thread that forked them ends, so it lives as long as they do.
        self._thread = threading.Thread(target=self._run, args=arguments, name="ranks", daemon=True)

    def start(self) -> None:
        """Start torch elastic's agent, which forks the ranks."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Return true until the agent has ended."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for the agent's end; return true if it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _launcher(self, size: int) -> Any:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        machines = nodes()
        # This package reports a rank that ends, with its name; the process that started this one handles signals.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN))
        # The configuration asks torch for GPUs, which would initialise CUDA here and make forks unusable.
        with answering({"count": 0, "capability": (0, 0)}):
            config = LaunchConfig(
                min_nodes=machines,
                max_nodes=machines,
                nproc_per_node=size,
                run_id=os.environ.get("PET_RDZV_ID") or uuid.uuid4().hex,
                max_restarts=0,
                monitor_interval=0.1,
                start_method="fork",
                logs_specs=DefaultLogsSpecs(log_dir=str(self._logs)),
                **(self._own_rendezvous() if machines == 1 else _torchruns_rendezvous()),
            )
        return elastic_launch(config, rank.main)

    def _own_rendezvous(self) -> dict[str, Any]:
        """Return the rendezvous of one machine's agent and ranks: through files in this load's own folder."""
        # torch (distributed/elastic/rendezvous/dynamic_rendezvous.py, ``next_rendezvous``) would start a store for the
        # ranks that listens on all interfaces.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.environ[STORE] = str(self._logs / "ranks.store")
        return {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": str(self._logs / "agents.store"),
            "rdzv_configs": {"timeout": _RENDEZVOUS, "store_type": "file"},
            "local_addr": "127.0.0.1",
        }

    def _run(self, *arguments: Any) -> None:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            self._launch(*arguments)
        except ChildFailedError as error:
            self.failures = {failure.local_rank: failure.exitcode for failure in error.failures.values()}
        except Exception as error:  # noqa: BLE001 - the thread that waits for the ranks reports any exception
            self.error = error


def _torchruns_rendezvous() -> dict[str, Any]:
    """Return the rendezvous of several machines' agents, as torchrun's variables give it."""
    return {
        "rdzv_backend": os.environ.get("PET_RDZV_BACKEND", "c10d"),
        "rdzv_endpoint": os.environ.get("PET_RDZV_ENDPOINT") or "127.0.0.1:0",
        "rdzv_configs": {"timeout": _RENDEZVOUS},
    }
