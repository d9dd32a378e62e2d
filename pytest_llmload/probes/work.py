"""The operations of the dispatcher and the device during a generation, as torch's profiler counts them.

These figures do not depend on the host's speed, and explain why a time has changed. They are counted in a separate pass
after everything that is timed, since the profiler slows down what it watches.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import Metric, named
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import Workload
from pytest_llmload.probes.base import Probe
from pytest_llmload.worker.model.device import synchronize
from pytest_llmload.worker.model.generation import generate_ids, input_ids, no_single_tokens, workload_tokens
from pytest_llmload.worker.model.inputs import vocabulary
from pytest_llmload.worker.model.loaded import Loaded

#: The most further tokens over which the figures of one token are averaged.
FURTHER = 16
_ON_GPU = ("kernels", "gpu_time", "copies", "syncs")
_NAMES = ("ops", *_ON_GPU)
#: The runtime's calls that wait for the GPU: cudaStreamSynchronize, hipDeviceSynchronize, cuCtxSynchronize …
_WAITS = re.compile(r"(?:cu|cuda|hip)[A-Z]\w*Synchronize\w*")


class Work(Probe):
    """Counts ``prefill.*`` (the workload's prompt and one token) and ``token.*`` (each further token).

    A token's figure is the difference between generating 1 + k tokens and generating one, divided by k, so that
    it does not include what a generation costs once. It runs last, after the timing.
    """

    metrics: ClassVar[tuple[Metric, ...]] = named(
        *(f"prefill.{name}" for name in _NAMES), *(f"token.{name}" for name in _NAMES)
    )

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.figures: dict[str, float] = {}

    def generated(self, loaded: Loaded) -> None:
        if no_single_tokens(loaded):
            return
        workload = self.job.spec.workload
        further = min(FURTHER, workload.new_tokens - 1)
        # The first profile of a process also holds the profiler's own start.
        self._count(loaded, workload, 1)
        prefill = self._count(loaded, workload, 1)
        self.figures = {f"prefill.{name}": prefill[name] for name in self._names()}
        if further:
            longer = self._count(loaded, workload, 1 + further)
            self.figures |= {f"token.{name}": (longer[name] - prefill[name]) / further for name in self._names()}

    def _names(self) -> tuple[str, ...]:
        return _NAMES if self.job.device.kind == "cuda" else ("ops",)

    def _count(self, loaded: Loaded, workload: Workload, new_tokens: int) -> Counter[str]:
        ids = input_ids(loaded, workload_tokens(workload, vocabulary(loaded)))

        def call() -> None:
            generate_ids(loaded, ids, new_tokens)
            synchronize(self.job)

        synchronize(self.job)
        return count(call, gpu=self.job.device.kind == "cuda")

    def fill(self, result: LoadResult) -> None:
        if self.job.device.kind != "cuda":
            names = [f"{part}.{name}" for part in ("prefill", "token") for name in _ON_GPU]
            result.unavailable |= dict.fromkeys(names, "no GPU in this run")
        if self.figures and not self.figures.get("prefill.kernels", 1):
            # Never 0: without its permission the profiler sees the CPU's side only.
            for name in [name for name in self.figures if not name.endswith(".ops")]:
                del self.figures[name]
                result.unavailable[name] = "the profiler saw no kernels: CUPTI is missing or not permitted"
        # Rounded as a baseline stores them, so that a third of an operator per token compares equal to itself.
        result.metrics |= {name: float(f"{value:.6g}") for name, value in self.figures.items()}


def count(call: Callable[[], None], *, gpu: bool) -> Counter[str]:
    """Count a call's ``ops`` (ATen operators, nested ones too), and on a GPU its ``kernels``, ``gpu_time``, ``copies``
    and ``syncs``.

    ``gpu_time`` is the kernels' seconds, ``copies`` are memcpy and memset, ``syncs`` are calls that wait for the GPU.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
    found: Counter[str] = Counter()
    for event in _events(profiler):
        _add(found, event)
    return found


def _events(profiler: Any) -> Any:
    # profiler.events() makes a tree of Python objects of the same events: seconds for a large model.
    return profiler.profiler.kineto_results.events()


def _add(found: Counter[str], event: Any) -> None:
    name = event.name()
    if event.device_type() == torch.autograd.DeviceType.CPU:
        found["ops"] += name.startswith("aten::")
        found["syncs"] += _WAITS.fullmatch(name) is not None
    elif name.startswith(("Memcpy", "Memset")):
        found["copies"] += 1
    elif not _is_annotation(event):
        found["kernels"] += 1
        if not name.startswith("nccl"):
            # NCCL's kernels spin until the other ranks are there: that is their time, not work.
            found["gpu_time"] += event.duration_ns() / 1e9


def _is_annotation(event: Any) -> bool:
    """Return true if an event is a range that user code named, shown on the GPU's side too; older torch cannot tell."""
    asked = getattr(event, "is_user_annotation", None)
    return asked is not None and bool(asked())
