"""The device's context and its end of work."""

from __future__ import annotations

from pytest_llmload.core.errors import LoadOutOfMemory
from pytest_llmload.core.job import Job


def synchronize(job: Job) -> None:
    """Wait until all GPUs have done all queued work; return at once on a CPU run."""
    if job.device.kind == "cuda":
        import torch

        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)


#: What torch's CPU allocator and cuBLAS say in a plain RuntimeError.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that the GPU's or the host's memory is used up, without importing torch."""
    if isinstance(error, (MemoryError, LoadOutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - it is code of the user's or of a library
        return False
    return any(text in message for text in _OUT_OF_MEMORY)


def create_context(job: Job) -> None:
    """Touch every visible GPU, so that no later figure contains a context's creation.

    Raises RuntimeError if the load is for a GPU and torch sees none: the load never falls back to the CPU.
    """
    if job.device.kind != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"the load is for a GPU, but torch {torch.__version__} (built for CUDA {torch.version.cuda or 'none'}, "
            f"HIP {torch.version.hip or 'none'}) sees none in its process"
        )
    for gpu in range(torch.cuda.device_count()):
        torch.empty(1, device=f"cuda:{gpu}")
    synchronize(job)
