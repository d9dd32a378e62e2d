"""Helpers for tests of your own strategies, probes and loaders: one load without a test run."""

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

#: Seconds that building the checkpoint may take, and that the load may take.
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
    """Load a model once on the CPU, in a separate process, and return the result with all figures and problems.

    Args:
        model: ``--llm-model``'s SPEC: hub id, directory, ``random:PRESET`` or ``random:PATH``.
        imports: Names of modules that the process imports before the load.
        strategies: Name -> import string ``"module:Class"``, as the hook returns them; added to the built-in ones.
        probes: Import strings of probes, added to the built-in ones.
        methods: Import strings of quantisation methods, added to the built-in ones.
        workload: ``"BATCHxPROMPT+NEW"``: prompts, tokens per prompt, and new tokens per prompt.
        cache_dir: Folder for built checkpoints; the user's cache by default.
        fields: Fields of :class:`LoadSpec`: ``quant="nf4"``, ``strategy="ours"``.

    Raises LoadFailed if the process answers with an error, LoadCrashed or LoadOutOfMemory if it dies, and LoadTimeout
    if it takes more than 600 seconds, each with the last lines that it printed. A load that does not end in the
    requested model does not raise: its result has ``outcome``, ``error`` and ``problems``. ::

        def test_ours():
            result = load_once(strategies={"awq": "ourapp.strategies:Awq"}, strategy="awq")
            assert result.ok, result.problems
    """
    import platform

    from pytest_llmload.host.loads.broker import ERRORS
    from pytest_llmload.host.loads.processes import LoadDied, start_cold
    from pytest_llmload.host.loads.warm_server import variables
    from pytest_llmload.host.settings.settings import default_cache

    with tempfile.TemporaryDirectory(prefix="pytest-llmload-") as folder:
        process = start_cold(Path(folder) / "load.log", variables(os.environ))
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
        except LoadDied as death:
            raise ERRORS[death.outcome]("\n".join(filter(None, (str(death), death.info.log)))) from None
        finally:
            process.close()


def _answer(reply: dict[str, Any], name: str) -> Any:
    if reply["kind"] == "error":
        info = ErrorInfo(**reply["error"])
        raise LoadFailed(f"{info.type_name}: {info.message}" if info.type_name else info.message)
    return reply[name]
