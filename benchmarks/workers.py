"""Load processes without pytest around them, by the code of a test's load; for the scripts beside this file."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from pytest_llmload.core.job import Job, Scope
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.preloaded_modules import BASE, architecture
from pytest_llmload.host.loads.processes import LoadDied, LoadProcess, fork
from pytest_llmload.host.loads.warm_server import WarmServer, variables
from pytest_llmload.worker.checkpoints.resolve import resolve

TIMEOUT = 600.0


class Workers:
    """A warm server for loads of one model on one device; ``measure`` makes one load in a process of its own."""

    def __init__(
        self,
        logs: Path,
        model: str,
        *,
        device: str = "auto",
        workload: str = "1x128+32",
        page_cache: str = "warm",
        imports: tuple[str, ...] = (),
        cache_dir: Path,
    ) -> None:
        self._logs = logs
        self._count = 0
        env = variables(os.environ)
        found = hardware.detect(device)
        found = dataclasses.replace(found, gpus=found.gpus[:1])
        name = model.removeprefix("random:")
        self.job = Job(
            spec=LoadSpec(model=model, name=name, workload=Workload.parse(workload)),
            device=found,
            checkpoint=resolve(model, cache_dir),
            imports=imports,
            sys_path=tuple(sys.path),
            page_cache=page_cache,
        )
        self.architecture = architecture(self.job.checkpoint.model_type)
        self._server = WarmServer(logs / "server.log", env)
        self._server.warm_up(
            [*BASE, *self.architecture],
            {"count": 1, "capability": found.gpus[0].capability} if found.gpus else None,
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def measure(self, scope: Scope) -> LoadResult:
        """One load; the benchmark ends where it fails."""
        given = {name: value for name, value in vars(scope).items() if value is not None}
        self._count += 1
        process = fork(self._server, self._logs / f"{self._count}.log")
        if not isinstance(process, LoadProcess):
            raise SystemExit(f"the server cannot fork: {process}")
        try:
            reply = process.request({"kind": "load", "job": dataclasses.replace(self.job, **given).to_json()}, TIMEOUT)
        except LoadDied as death:
            raise SystemExit(f"{death}\n{death.info.log}") from None
        finally:
            process.close()
        if reply["kind"] == "error":
            raise SystemExit(f"{reply['error']['message']}\n{reply['error']['traceback']}")
        result = LoadResult.from_json(reply["result"])
        if result.problems:
            raise SystemExit("; ".join(problem.message for problem in result.problems))
        return result
