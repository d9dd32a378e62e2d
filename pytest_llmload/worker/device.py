"""The device's context and its end of work."""

from __future__ import annotations

from pytest_llmload.core.job import Job


def synchronize(job: Job) -> None:
    """Wait until all GPUs have done what was asked of them; nothing on a CPU run."""
    if job.device.kind == "cuda":
        import torch

        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the GPU's or the host's memory is used up.

    torch's CPU allocator and cuBLAS say so in a RuntimeError's text only.
    """
    import torch

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    texts = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def create_context(job: Job) -> None:
    """Touch every visible GPU, so that no later figure contains a context's creation.

    Raises RuntimeError where a GPU was asked for and torch sees none: never a quiet load on the CPU.
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
