"""Nothing off the device that the load was for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from pytest_llmload.core.results import Problem
from pytest_llmload.core.units import plural
from pytest_llmload.worker.checks.problem_names import named, size_of, sized
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.tensors import STATE, Held
from pytest_llmload.worker.planning.placement import lookup

CHECK = "devices"


def check(loaded: Loaded) -> Iterator[Problem]:
    """Report parameters, buffers and states that are offloaded, left on meta or on a different device.

    On a CPU run the CPU is the device, and only disk and meta count. A load whose plan says where modules go is judged
    by :func:`as_planned` instead.
    """
    if loaded.planned_map is not None:
        yield from as_planned(loaded)
        return
    target = loaded.job.device.kind
    # Limits that name the CPU or the disk are a wish to use them.
    allowed = {target} | ({"cpu", "disk"} & {device for device, _ in loaded.job.spec.max_memory})
    wrong: dict[str, list[Held]] = defaultdict(list)
    for held in loaded.inventory.held:
        if held.role == STATE and "." not in held.name:
            # A plain attribute of a module (the original rotary frequencies): nothing computes with it in place.
            continue
        if held.device.split(":")[0] not in allowed:
            wrong[held.device].append(held)
    for device, found in wrong.items():
        where = "left without values on" if device == "meta" else "offloaded to" if found[0].offloaded else "on"
        yield Problem(
            CHECK,
            f"{sized(found, 'tensor')} {plural(len(found), 'is', 'are')} {where} {device}; the load was for {target}",
            named(found),
            size_of(found),
        )


def as_planned(loaded: Loaded) -> Iterator[Problem]:
    """Check that each parameter is where the plan puts its module."""
    planned = loaded.planned_map or {}
    wrong: dict[tuple[str, str], list[Held]] = defaultdict(list)
    for held in loaded.inventory.parameters():
        want = planned_device(planned, loaded.inventory.base_path(held))
        if want and held.device != want:
            wrong[want, held.device].append(held)
    for (want, have), found in wrong.items():
        yield Problem(
            CHECK,
            f"{sized(found, 'tensor')} {plural(len(found), 'is', 'are')} on {have}, the plan says {want}",
            named(found),
            size_of(found),
        )


def planned_device(planned: Mapping[str, int | str], path: str) -> str:
    """Return the device, by torch's name, on which a map of modules puts a tensor; empty without an entry for it."""
    entry = str(lookup(planned, path, ""))
    return f"cuda:{entry}" if entry.isdigit() else "cuda:0" if entry == "cuda" else entry
