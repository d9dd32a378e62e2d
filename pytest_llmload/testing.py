"""Helpers for tests of your own strategies, probes and loaders: one load, without a test run around it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import Checkpoint, Device, Job
from pytest_llmload.core.results import ErrorInfo, LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload

#: Seconds for building the checkpoint, and for the load.
_TIMEOUT = 600.0


def load_once(
    model: str = "random:tiny-llama",
    *,
    imports: Sequence[str] = (),
    strategies: Mapping[str, str] | None = None,
    probes: Sequence[str] = (),
    methods: Sequence[str] = (),
    workload: str = "1x16+4",
    cache_dir: Path | None = None,
    **fields: Any,
) -> LoadResult:
    """Load once on the CPU in a process of its own, and give back everything that was seen.

    ``fields`` are those of :class:`LoadSpec`: ``quant="nf4"``, ``strategy="ours"``. ``strategies``, ``probes`` and
    ``methods`` (of quantisation) are import strings, as the hooks give them; they are added to the built-in ones.
    Raises LoadFailed if the process answers with an error, and what the process died of otherwise::

        def test_ours():
            result = load_once(strategies={"awq": "ourapp.strategies:Awq"}, strategy="awq")
            assert result.ok, result.problems
    """
    import platform

    from pytest_llmload.host.loads.processes import environment, start_cold
    from pytest_llmload.host.settings.settings import default_cache

    with tempfile.TemporaryDirectory(prefix="pytest-llmload-") as folder:
        process = start_cold(Path(folder) / "load.log", environment(os.environ))
        try:
            where = str(cache_dir or default_cache())
            request = {"kind": "resolve", "spec": model, "cache_dir": where, "trust_remote_code": False}
            checkpoint = Checkpoint(**_answer(process.request(request, _TIMEOUT), "checkpoint"))
            job = Job(
                spec=LoadSpec(model=model, name="model", workload=Workload.parse(workload), **fields),
                device=Device(kind="cpu", key=f"cpu-{platform.machine()}"),
                checkpoint=checkpoint,
                imports=tuple(imports),
                strategies=dict(strategies or {}),
                probes=tuple(probes),
                methods=tuple(methods),
                sys_path=tuple(sys.path),
            )
            request = {"kind": "load", "job": job.to_json()}
            return LoadResult.from_json(_answer(process.request(request, _TIMEOUT), "result"))
        finally:
            process.close()


def _answer(reply: dict[str, Any], name: str) -> Any:
    if reply["kind"] == "error":
        info = ErrorInfo(**reply["error"])
        raise LoadFailed(f"{info.type_name}: {info.message}" if info.type_name else info.message)
    return reply[name]
