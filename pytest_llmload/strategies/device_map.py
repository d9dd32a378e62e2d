"""accelerate's and transformers' own maps: auto, balanced, sequential."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.strategies.base import Strategy, why_ignored
from pytest_llmload.worker.planning.placement import Placement, device_limits

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec


class _Mapped(Strategy):
    is_device_map = True

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        return why_ignored(spec, "device_map")

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        return {"device_map": self.name, "max_memory": device_limits(job)}


class Auto(_Mapped):
    name = "auto"
    placement = Placement(inferred="auto")
    summary = "device_map='auto', with limits from the devices' total memory."
    fields: ClassVar[dict[str, Any]] = {"strategy": "auto"}


class Balanced(_Mapped):
    name = "balanced"
    placement = Placement(inferred="balanced")
    summary = "device_map='balanced': equal parts on all GPUs."
    fields: ClassVar[dict[str, Any]] = {"strategy": "balanced"}


class Sequential(_Mapped):
    name = "sequential"
    placement = Placement(inferred="sequential")
    summary = "device_map='sequential': one GPU after the other."
    fields: ClassVar[dict[str, Any]] = {"strategy": "sequential"}
