"""Everything on one device, as the checkpoint says."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.worker.strategies.base import Strategy, from_pretrained, load_with_map


class Single(Strategy):
    """The placement of a load that no marker places; or the map of modules that ``device_map`` gives."""

    name = "single"
    summary = "Everything on one device, in the checkpoint's dtype unless another is asked for."
    fields: ClassVar[dict[str, Any]] = {"strategy": "single"}

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        if job.spec.device_map is not None:
            return {"device_map": json.loads(job.spec.device_map)}
        return {"device_map": {"": 0 if job.device.kind == "cuda" else "cpu"}}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        return from_pretrained(job, kwargs) if job.spec.device_map is None else load_with_map(job, kwargs)
