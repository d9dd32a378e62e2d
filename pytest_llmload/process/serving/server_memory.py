"""The memory that a started server holds, and what it tells of the model's quantisation."""

from __future__ import annotations

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.process.serving import endpoint_checks, memory
from pytest_llmload.quantisation.registry import schemes


def measure(job: Job, result: LoadResult, pid: int) -> None:
    """Add the figures of the server's processes to a result that has ``server.settled``, and what they show."""
    result.metrics["server.peak"] = memory.peak(pid)
    result.phase_peaks["generate"] = {"host": result.metrics["server.peak"]}
    held: float | None = result.metrics["server.settled"]
    if job.device.kind == "cuda":
        gpus, why = memory.on_gpus(pid, job.device)
        held = sum(gpus.values()) if gpus else None
        if "kv_cache.tokens" in result.metrics:
            why = why or "the server fills the GPU with its cache by design: see kv_cache.tokens for its capacity"
        elif job.spec.option("continuous_batching"):
            why = why or "with continuous batching the server fills the GPU with its cache and does not report its size"
        if why:
            result.unavailable["gpu.process"] = why
        else:
            result.metrics |= {f"gpu.{gpu}.process": size for gpu, size in gpus.items()}
            result.metrics["gpu.process"] = sum(gpus.values())
        result.phase_peaks["generate"] |= {f"gpu.{gpu}": size for gpu, size in gpus.items()}
    if job.spec.quant != AS_STORED:
        problems, note = endpoint_checks.quantised(job, pid, held)
        result.problems += problems
        result.notes += filter(None, [note])
        served = schemes()[job.spec.quant][0].served
        if served is not None and any(getattr(job.spec, name) != value for name, value in served.fields.items()):
            result.notes.append(served.note)
