"""bitsandbytes: int8, nf4 and fp4, quantised while the model is loaded."""

from __future__ import annotations

import json
from typing import Any

from pytest_llmload.core.job import Job


def offload_setting(job: Job) -> dict[str, Any]:
    """What bitsandbytes must be told where part of the model is meant for the CPU or the disk: to keep that part dense.

    Without it transformers refuses the load.
    """
    spec = job.spec
    mapped = set(json.loads(spec.device_map).values()) if spec.device_map is not None else set()
    if spec.strategy in ("offload", "max_memory") or (len(mapped) > 1 and mapped & {"cpu", "disk"}):
        return {"llm_int8_enable_fp32_cpu_offload": True}
    return {}
