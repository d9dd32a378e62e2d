"""The whole model on one device, as the checkpoint says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.strategies.base import Strategy
from pytest_llmload.worker.planning.placement import Placement

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec


class Single(Strategy):
    """The placement of a load without a marker that places it; or the map of modules that ``device_map`` gives."""

    name = "single"
    summary = "Everything on one device, in the checkpoint's dtype unless the test requests a different one."
    fields: ClassVar[dict[str, Any]] = {"strategy": "single"}
    placement = Placement()

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        if not spec.max_memory:
            return ""
        placed = "a map of modules" if spec.device_map is not None else "a load on one device"
        return f"{placed} would ignore max_memory: use strategy('max_memory', max_memory=...), or omit it"

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        if job.spec.device_map is not None:
            return {"device_map": json.loads(job.spec.device_map)}
        return {"device_map": {"": 0 if job.device.kind == "cuda" else "cpu"}}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        from pytest_llmload.worker.model.loading import from_pretrained, load_with_map

        return from_pretrained(job, kwargs) if job.spec.device_map is None else load_with_map(job, kwargs)
