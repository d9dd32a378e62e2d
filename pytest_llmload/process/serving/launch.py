"""Make the command line that starts a job's server."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from pytest_llmload.core.dtypes import TORCH_NAMES
from pytest_llmload.core.job import Job
from pytest_llmload.core.spec import AS_STORED, CHECK_OPTIONS
from pytest_llmload.process.serving.server_process import HOST, transformers_command
from pytest_llmload.quantisation.registry import schemes
from pytest_llmload.strategies.served import Served


def command(job: Job, port: int) -> list[str]:
    """Return the user's own command with its placeholders filled in, or the command of ``transformers serve``."""
    own = job.spec.option("command")
    if own is None:
        return transformers_command(_arguments(job, port))
    parts = shlex.split(own) if isinstance(own, str) else [str(part) for part in own]
    places = {"{model}": job.checkpoint.path, "{host}": HOST, "{port}": str(port)}
    for place, value in places.items():
        parts = [part.replace(place, value) for part in parts]
    return parts


def _arguments(job: Job, port: int) -> list[str]:
    spec = job.spec
    # A single GPU is given by its number: "auto" would also use the CPU if the model does not fit.
    device = "cpu" if job.device.kind == "cpu" else "cuda:0" if len(job.device.gpus) == 1 else "auto"
    given = {
        "host": HOST,
        "port": str(port),
        "device": device,
        "dtype": TORCH_NAMES[spec.dtype] if spec.dtype else "auto",
        "quantization": _flag(spec.quant),
        "attn-implementation": spec.attn,
        "trust-remote-code": job.trust_remote_code,
    }
    own = set(Served.options) | set(CHECK_OPTIONS)
    given |= {name.replace("_", "-"): json.loads(value) for name, value in spec.options if name not in own}
    arguments = [job.checkpoint.path]
    for name, value in given.items():
        if isinstance(value, bool):
            arguments += [f"--{name}"] if value else []
        elif value is not None:
            arguments += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return arguments


def _flag(quant: str) -> str | None:
    """Return the value of ``--quantization`` for a scheme; None if the load is not quantised."""
    if quant == AS_STORED:
        return None
    served = schemes()[quant][0].served
    return served.flag if served is not None else None


def log_of(log: Path) -> Path:
    """Return the path of the server's log, next to the load's own log."""
    return log.with_name(f"{log.name}.server")
