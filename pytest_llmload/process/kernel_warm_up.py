"""Run the kernels of a job's architecture once before its load.

The first use of a kernel in a process takes time: its code is loaded, and on some GPUs a plan is made for each length
of the key-value cache (cuDNN's attention, 35 ms each on an H200). That is some 0.9 s for a short workload, the same for
every model of an architecture. It is not part of any figure, so it can be done here, while the previous load is
measured. So can the config that a check compares with, which is made once in a process.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from pytest_llmload.core.job import MEMORY, Job
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checks import config_fields
from pytest_llmload.worker.model import padded_batch
from pytest_llmload.worker.model.device import create_context
from pytest_llmload.worker.model.generation import can_generate, first_forward, generate_workload
from pytest_llmload.worker.model.inputs import check_inputs
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.planning.planner import load_dtype


def warm_up(job: Job) -> str:
    """Run the job's forward and workload on one layer of its architecture; leave nothing in the GPU's allocator.

    Return why that was not possible, or an empty string. Only loads on a GPU whose memory is measured are warmed up; a
    process that measures time runs everything once before it is timed.
    """
    if job.device.kind != "cuda" or not job.measure or MEMORY not in job.figures:
        return ""
    try:
        _run(job)
    except Exception as error:  # noqa: BLE001 - the load itself will show whether the model runs
        return f"kernels were not run before the load: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        gc.collect()
        torch.cuda.synchronize()
        # cuBLAS keeps its workspaces in the caching allocator. The load must find the allocator as it was before, since
        # transformers first allocates less if the allocator holds unused memory.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        create_context(job)
    return ""


def _run(job: Job) -> None:
    directory = Path(job.checkpoint.path)
    model = meta_model(
        directory,
        trust_remote_code=job.trust_remote_code,
        dtype=load_dtype(job),
        auto_class=job.spec.auto_class,
        layers=1,
    )
    model = model.to_empty(device="cuda:0").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        # Uninitialised memory could send a router or an index out of range.
        tensor.data.zero_()
    loaded = Loaded(job=job, model=model)
    if check_inputs(loaded):
        return
    first_forward(loaded)
    if job.checks:
        config_fields.expected_config(job.checkpoint.path, job.trust_remote_code, job.spec.auto_class)
    if job.generates and can_generate(loaded):
        generate_workload(loaded)
        padded_batch.run(loaded)
