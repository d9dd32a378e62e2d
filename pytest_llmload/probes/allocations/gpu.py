"""Record the allocations of GPU memory, by the history that torch's caching allocator keeps itself."""

from __future__ import annotations

from typing import Any

import torch

from pytest_llmload.probes.allocations.sites import Frame, site
from pytest_llmload.probes.allocations.timeline import HeldBlock, Timeline

#: The most events that are kept; a load has some hundred thousand, each of some hundred bytes.
_EVENTS = 1_000_000


def start() -> None:
    """Start recording; drop earlier records."""
    torch.cuda.memory._record_memory_history(None)
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=_EVENTS)


def timelines() -> dict[int, Timeline]:
    """Stop recording, and return the timeline of each GPU by its index."""
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(None)
    return {gpu: timeline_of(events) for gpu, events in enumerate(snapshot["device_traces"])}


def timeline_of(events: list[dict[str, Any]]) -> Timeline:
    """Return the timeline of one GPU, from the events of its ``device_traces`` in a snapshot."""
    found = Timeline()
    for event in events:
        if event["action"] == "alloc":
            frames = (Frame(each["filename"], each["line"], each["name"]) for each in event.get("frames", ()))
            found.allocated(event["addr"], HeldBlock(event["size"], site(frames)))
        elif event["action"] == "free_completed":
            found.released(event["addr"])
    return found
