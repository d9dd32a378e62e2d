"""Part of the model on the CPU and on disk, brought in for each forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.strategies.base import Strategy
from pytest_llmload.worker.planning.placement import Placement, default_offload_map

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


class Offload(Strategy):
    """Loads with accelerate's hooks, by the spec's ``device_map`` or ``max_memory``, or else the planner's default map.

    On a CPU run only weights on disk count as offloaded.
    """

    name = "offload"
    summary = "CPU and disk offload through accelerate's hooks."
    fields: ClassVar[dict[str, Any]] = {"strategy": "offload"}
    placement: ClassVar[Placement] = Placement(default_map=default_offload_map, offloads=True)

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        from pytest_llmload.worker.planning.planner import plan_load

        return {"device_map": plan_load(job, self.placement).device_map}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        from pytest_llmload.worker.model.loading import load_with_map

        return load_with_map(job, kwargs)

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        """Check that accelerate's hooks hold offloaded weights, and note how many bytes.

        That the offloaded model runs is shown by the forward and by generating the workload.
        """
        offloaded = [held for held in loaded.inventory.held if held.offloaded]
        size = sum(held.nbytes for held in offloaded)
        on_disk = sum(held.nbytes for held in offloaded if held.device == "disk")
        if not size:
            return [Problem(self.name, "nothing is offloaded: none of accelerate's hooks holds a weight")]
        loaded.notes.append(f"offloaded: {format_bytes(size - on_disk)} to the CPU, {format_bytes(on_disk)} to disk")
        return []
