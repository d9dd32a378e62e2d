"""A map that keeps each device under a limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import format_bytes
from pytest_llmload.strategies.base import Strategy, why_ignored
from pytest_llmload.worker.planning.placement import Placement, default_max_memory

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.worker.model.loaded import Loaded


class MaxMemory(Strategy):
    """Loads with a map that the planner infers as the libraries do; the checks use the same map."""

    name = "max_memory"
    summary = "A limit per device; what does not fit goes to the next GPU, to the CPU, to disk."
    fields: ClassVar[dict[str, Any]] = {"strategy": "max_memory"}
    placement: ClassVar[Placement] = Placement(inferred="auto", default_limits=default_max_memory, offloads=True)

    @classmethod
    def refuses(cls, spec: LoadSpec, endpoint: str) -> str:
        return why_ignored(spec, "device_map")

    def load_kwargs(self, job: Job) -> dict[str, Any]:
        from pytest_llmload.worker.planning.planner import plan_load

        self.plan = plan_load(job, self.placement)
        return {"device_map": self.plan.device_map}

    def load(self, job: Job, kwargs: dict[str, Any]) -> Any:
        from pytest_llmload.worker.model.loading import load_with_map

        return load_with_map(job, kwargs)

    def applied(self, job: Job, loaded: Loaded) -> Iterable[Problem]:
        return over_limit(loaded, self.plan.max_memory)


def over_limit(loaded: Loaded, limits: Mapping[int | str, int]) -> Iterator[Problem]:
    """Yield a problem for each device that holds more weights than its limit."""
    held: dict[str, int] = defaultdict(int)
    for (place, _), part in loaded.inventory.storages().items():
        held[place.removeprefix("cuda:")] += part
    for device, limit in limits.items():
        size = held[str(device)]
        if size > limit:
            message = f"device {device} holds {format_bytes(size)} of weights, its limit is {format_bytes(limit)}"
            yield Problem("max_memory", message, bytes=size - limit)
