"""Every marker, by name. A marker is added by one class and one entry here."""

from __future__ import annotations

from pytest_llmload.host.markers.base import LimitMarker, LoadMarker, Marker
from pytest_llmload.host.markers.limits import GpuMemoryMarker, LatencyBudgetMarker, MemoryCeilingMarker
from pytest_llmload.host.markers.load import (
    AttnMarker,
    AutoClassMarker,
    DeviceMapMarker,
    DtypeMarker,
    GpuCountMarker,
    LoraMarker,
    QuantMarker,
    StrategyMarker,
    WorkloadMarker,
)

#: Markers that say what to load, in the order in which their values make a test's id.
LOAD_MARKERS: dict[str, type[LoadMarker]] = {
    marker.name: marker
    for marker in (
        StrategyMarker,
        QuantMarker,
        DtypeMarker,
        LoraMarker,
        DeviceMapMarker,
        GpuCountMarker,
        AttnMarker,
        AutoClassMarker,
        WorkloadMarker,
    )
}
#: Markers that bound what a load may need.
LIMIT_MARKERS: dict[str, type[LimitMarker]] = {
    marker.name: marker for marker in (GpuMemoryMarker, MemoryCeilingMarker, LatencyBudgetMarker)
}


def markers() -> dict[str, type[Marker]]:
    """Return every marker by name."""
    return {**LOAD_MARKERS, **LIMIT_MARKERS}


def lines() -> list[str]:
    """Return the lines of ``pytest --markers``."""
    found = [f"{marker.usage()}: {marker.help()}" for marker in markers().values()]
    return [*found, "llmload(suite=False): Uses a load of a model (set by pytest-llmload itself; for -m 'not llmload')"]
