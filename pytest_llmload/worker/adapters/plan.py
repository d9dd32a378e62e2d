"""The memory that an adapter will need besides the weights, from its file's header."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pytest_llmload.core.job import Job
from pytest_llmload.core.spec import AS_STORED
from pytest_llmload.worker.adapters.files import bare
from pytest_llmload.worker.checkpoints.headers import ADAPTER_WEIGHTS, read_header

_FP32 = 4


def adapter_tensors(job: Job, base_itemsize: int) -> Iterator[tuple[str, str, int]]:
    """Yield each tensor's module of the base, name and bytes; nothing if there is no adapter or it is merged.

    ``peft`` keeps 16-bit adapters in float32 (``autocast_adapter_dtype``); ``load_adapter`` uses the dtype of the
    layer that it tunes, with ``base_itemsize`` bytes, or float32 if that layer is quantised.
    """
    spec = job.spec
    peft = spec.adapter_via == "peft"
    if job.adapter is None or (peft and spec.adapter_merged):
        return
    size = _FP32 if peft or spec.quant != AS_STORED else base_itemsize
    for stored in read_header(Path(job.adapter.path) / ADAPTER_WEIGHTS):
        name = bare(stored.tensor.name)
        module, lora, leaf = name.partition(".lora_")
        if not lora:
            module, _, leaf = name.rpartition(".")
        yield module, f"{lora}{leaf}".lstrip("."), math.prod(stored.tensor.shape) * size
