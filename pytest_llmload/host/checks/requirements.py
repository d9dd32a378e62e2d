"""Check the machine for a load's needs; if one is missing, the test is skipped, or ends with an error on request."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.units import counted, format_bytes, format_seconds
from pytest_llmload.host.doctor import disk
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.markers.limits import GpuMemoryMarker
from pytest_llmload.host.markers.nearest import limit_marks, nearest
from pytest_llmload.host.settings import options
from pytest_llmload.worker.planning.placement import CONTEXT

if TYPE_CHECKING:
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.run.state import State

#: A load needs at most this many times its checkpoint: 4-bit files that are loaded in fp32.
_MOST = 8


def missing(state: State, item: pytest.Item, spec: LoadSpec | None) -> str | None:
    """Return why a test cannot run here; None if it can. Raises MachineError if the device itself is in doubt."""
    if spec is not None and state.broker.runs_already(spec):
        missing = state.strategies.missing_client_packages(spec)
        return f"an endpoint needs {', '.join(missing)}, not installed: {installation(missing)}" if missing else None
    gpus = state.device.gpus
    marks = nearest(item, "gpu_count")
    own = state.spec_of(item)
    if own is not None:
        # Each count is a variant of the test.
        wanted = own.gpu_count if marks else 0
    else:
        wanted = max((state.marks.gpus(mark, item.nodeid) for mark in marks), default=0)
    if spec is not None:
        if packages := state.strategies.missing_packages(spec):
            return f"{spec.slug} needs {', '.join(packages)}, not installed: {installation(packages)}"
        needed = state.broker.gpus_needed(spec)
        # On the CPU a parallel strategy shards over CPU devices.
        if state.device.kind == "cuda" or spec.world_size == 1 < needed:
            wanted = max(wanted, needed)
    if wanted > len(gpus):
        return f"needs {counted(wanted, 'GPU')}, this run sees {len(gpus)} ({state.device.key})"
    for mark in limit_marks(item, GpuMemoryMarker.name):
        size = GpuMemoryMarker.read(mark, item.nodeid)
        smallest = min((gpu.total for gpu in gpus[: max(wanted, 1)]), default=0)
        if smallest < size:
            return f"needs GPUs of {format_bytes(size)}, this run's have {format_bytes(smallest)} ({state.device.key})"
    uses = "llm" in getattr(item, "fixturenames", ())
    if spec is None or not uses:
        return None
    if reason := over_budget(state, spec):
        return reason
    fill_no_disk(state, spec)
    return does_not_fit(state, spec)


def over_budget(state: State, spec: LoadSpec) -> str | None:
    """Return why a load may not start any more if the time for all loads is spent. A measured load may be used."""
    seconds = state.settings.budget
    if not seconds or state.loads.of(spec).measured:
        return None
    now = time.monotonic()
    if state.budget_ends is None:
        state.budget_ends = now + seconds
    if now < state.budget_ends:
        return None
    return f"not measured: {options.flag(state.config, 'budget')} of {format_seconds(seconds)} is spent"


def fill_no_disk(state: State, spec: LoadSpec) -> None:
    """Raise MachineError, before the load starts, if the weights that it offloads would fill the disk."""
    placement = state.strategies[spec.strategy].placement
    divides = placement is not None and (placement.divides or spec.device_map is not None)
    if not divides or state.loads.of(spec).measured:
        return
    try:
        size = state.broker.checkpoint(spec.model).bytes
    except LoadFailed:
        return  # the files are no model: the load itself says so
    folder = Path(tempfile.gettempdir())
    if not disk.shortage(folder, size * _MOST):
        return
    if short := disk.shortage(folder, int(state.broker.plan(spec).get("disk", 0))):
        raise MachineError(f"{spec.slug} {short}: nothing was loaded; make room or set TMPDIR to a larger disk")


def does_not_fit(state: State, spec: LoadSpec) -> str | None:
    """Return why a model cannot fit by the planner's figures, which need no weights; None if it may."""
    if state.settings.predict or state.strategies[spec.strategy].own_code or state.loads.of(spec).measured:
        return None
    device = state.device
    try:
        checkpoint = state.broker.checkpoint(spec.model)
    except LoadFailed:
        return None  # the files are no model: the load itself says so
    count = state.broker.gpus_needed(spec)
    rooms = {f"gpu.{gpu.index}.settled": gpu.total - CONTEXT for gpu in device.gpus[:count]}
    rooms["host.weights"] = hardware.host_memory()
    if checkpoint.bytes * _MOST < min(rooms.values()):
        return None
    planned = state.broker.plan(spec)
    for name, room in rooms.items():
        if planned.get(name, 0) > room:
            gpu = (f"GPU {name.split('.')[1]}", " beside CUDA's context")
            place, beside = ("the host", "") if name.startswith("host") else gpu
            needs = f"{spec.slug} needs {format_bytes(planned[name])} on {place} by plan"
            return f"{needs}, which has {format_bytes(room)}{beside}"
    return None


def installation(packages: Iterable[str]) -> str:
    """Return the command that installs packages, named by what is imported: by the extras that they are part of."""
    extras: dict[str, str] = {}
    for text in importlib.metadata.requires("pytest-llmload") or ():
        requirement = Requirement(text)
        extra = re.search(r"extra == [\"'](.+?)[\"']", str(requirement.marker))
        if extra is not None and extra[1] != "dev":
            extras.setdefault(canonicalize_name(requirement.name), extra[1])
    names = [canonicalize_name(package) for package in packages]
    own = dict.fromkeys(extras[name] for name in names if name in extras)
    others = [name for name in names if name not in extras]
    return " ".join(["pip install", *([f"'pytest-llmload[{','.join(own)}]'"] if own else []), *others])
