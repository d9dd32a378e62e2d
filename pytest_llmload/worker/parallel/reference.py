"""Same output: a model in shards computes what the whole model computes.

Both read the same tokens (teacher-forced), so that one different token is not a different text. The error that is
allowed is the dtype's own: twice what the whole model in that dtype is off from itself in fp32, measured here and now.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator
from typing import Any

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.system.proc import available
from pytest_llmload.worker.model.device import is_out_of_memory
from pytest_llmload.worker.model.generation import first_forward, generate_workload
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.loading import from_pretrained
from pytest_llmload.worker.model.relative_error import relative_error

CHECK = "output"
#: Of the dtype's own error.
_FACTOR = 2.0
#: What fp32 itself may be off by: sums in a different order. Seen: 1e-6 on two to four ranks.
_FP32_ERROR = 1e-5
#: Room that a reference gets beyond its weights.
_ROOM = 1.3


def check(loaded: Loaded) -> Iterator[Problem]:
    """Compare what was kept of the sharded load with the whole model, loaded here twice: as it is, and in fp32.

    Greedy tokens are compared in fp32 only: in 16 bit, a clean load matches half of the sequences. Where the whole
    model has no room on one device, or runs out of memory there, a note says that nothing was compared.
    """
    mine = loaded.kept_logits
    if mine is None:
        return
    dtype = str(next(held.dtype for held in loaded.inventory.parameters() if "float" in held.dtype))
    device = _device_with_room(loaded)
    if device is None:
        loaded.notes.append("output was not compared: no device has room for the whole model in fp32")
        return
    try:
        plain, tokens = _output(loaded, dtype, device, generates=dtype == "float32" and loaded.kept_tokens is not None)
        exact = plain if dtype == "float32" else _output(loaded, "float32", device)[0]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        place = "the host" if device == "cpu" else "the first GPU"
        loaded.notes.append(f"output was not compared: the whole model ran out of memory beside this one on {place}")
        return
    own = relative_error(plain, exact)
    allowed = max(_FACTOR * own, _FP32_ERROR)
    off = relative_error(mine, plain)
    loaded.notes.append(
        f"logits are {off:.2e} off the whole model's in {dtype}; {allowed:.2e} is allowed"
        + (f" ({_FACTOR:g} x its own error against float32)" if own else "")
    )
    if not off <= allowed:
        yield Problem(
            CHECK,
            f"not the whole model's output: logits on the same tokens are {off:.2e} off the whole {dtype} model's, "
            f"{allowed:.2e} is allowed",
        )
    elif tokens is not None and tokens != loaded.kept_tokens:
        yield Problem(CHECK, f"greedy tokens in float32 are not the whole model's: {loaded.kept_tokens}, not {tokens}")


def _output(loaded: Loaded, dtype: str, device: str, *, generates: bool = False) -> tuple[Any, list[list[int]] | None]:
    """Return the whole model's logits on the first forward's tokens, and the workload's tokens if it ``generates``."""
    kwargs: dict[str, Any] = {"dtype": getattr(torch, dtype), "device_map": {"": device}}
    attention = getattr(loaded.config, "_attn_implementation", None)
    if attention:
        kwargs["attn_implementation"] = attention
    whole = from_pretrained(_alone(loaded.job), kwargs)
    try:
        logits = first_forward(whole).detach().float().cpu()
        tokens = generate_workload(whole).tolist() if generates else None
    finally:
        del whole
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    return logits, tokens


def _alone(job: Job) -> Job:
    """Return a job for the same model, and nothing else of the load."""
    return dataclasses.replace(job, spec=dataclasses.replace(job.spec, strategy="single", world_size=1))


def _device_with_room(loaded: Loaded) -> str | None:
    """Return the load's first GPU, else the host, if the whole model fits there in fp32."""
    elements = sum(_elements(loaded))
    need = elements * 4 * _ROOM
    if loaded.job.device.kind == "cuda" and torch.cuda.mem_get_info(0)[0] > need:
        return "cuda:0"
    return "cpu" if available() > need else None


def _elements(loaded: Loaded) -> Iterator[int]:
    shards = loaded.shards
    if shards is None:
        yield from (held.tensor.numel() for held in loaded.inventory.distinct() if held.tensor is not None)
        return
    wholes = {piece.name: piece.whole for piece in shards.pieces.values()}
    yield from (math.prod(shape) for shape in wholes.values())
