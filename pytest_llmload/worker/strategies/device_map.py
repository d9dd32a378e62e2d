"""accelerate's and transformers' own maps: auto, balanced, sequential."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.worker.strategies.base import Strategy

#: Share of a GPU's memory that a map may fill: what transformers itself leaves on one GPU.
_SHARE = 0.9


class _Mapped(Strategy):
    def load_kwargs(self, job: Job) -> dict[str, Any]:
        return {"device_map": self.name, "max_memory": limits(job)}


class Auto(_Mapped):
    name = "auto"
    summary = "device_map='auto', with limits from the devices' total memory."
    fields: ClassVar[dict[str, Any]] = {"strategy": "auto"}


class Balanced(_Mapped):
    name = "balanced"
    summary = "device_map='balanced': equal parts on all GPUs."
    fields: ClassVar[dict[str, Any]] = {"strategy": "balanced"}


class Sequential(_Mapped):
    name = "sequential"
    summary = "device_map='sequential': one GPU after the other."
    fields: ClassVar[dict[str, Any]] = {"strategy": "sequential"}


def limits(job: Job) -> dict[int | str, int]:
    """The spec's ``max_memory``, else limits from total memory.

    Without limits the libraries take what is free at that moment, and the map is another one on every run.
    """
    if job.spec.max_memory:
        return library_keys(dict(job.spec.max_memory))
    found: dict[int | str, int] = {}
    if job.device.kind == "cuda":
        import torch

        for gpu in range(torch.cuda.device_count()):
            found[gpu] = int(torch.cuda.get_device_properties(gpu).total_memory * _SHARE)
    found["cpu"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return found


def library_keys(limits_by_name: dict[str, int]) -> dict[int | str, int]:
    """``{"0": …, "cpu": …}`` as the libraries write it: GPUs are numbers, and come first."""
    numbers: dict[int | str, int] = {int(name): size for name, size in limits_by_name.items() if name.isdigit()}
    return numbers | {name: size for name, size in limits_by_name.items() if not name.isdigit()}
