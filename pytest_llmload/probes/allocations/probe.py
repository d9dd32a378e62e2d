"""The lines of code that allocated the memory held at the peaks and after the load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pytest_llmload.core.job import Job
from pytest_llmload.core.results import KEPT, AllocationSite, LoadResult
from pytest_llmload.probes.allocations import gpu
from pytest_llmload.probes.allocations.host import PythonRecorder, TorchRecorder
from pytest_llmload.probes.allocations.timeline import HeldBlock, Timeline, by_site
from pytest_llmload.probes.base import Probe
from pytest_llmload.probes.holders import holders
from pytest_llmload.probes.other_tensors import live_tensors, storages
from pytest_llmload.system.garbage import all_listed
from pytest_llmload.worker.model.loaded import Loaded

#: The most lines that are reported for a moment and a place, and the fewest bytes of one.
_MOST, _LEAST = 8, 256 << 10


class Allocations(Probe):
    """Fills ``allocations`` of the result: the lines that allocated memory outside the model, at each peak and after.

    The load is repeated for this probe alone, since recording costs time and memory: nothing else is measured in it.
    """

    partial: ClassVar[bool] = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._torch = TorchRecorder()
        self._python = PythonRecorder()
        self._is_gpu = job.device.kind == "cuda"
        self._found: list[AllocationSite] = []

    def loading(self) -> None:
        self._begin()
        self._python.start()

    def loaded(self, loaded: Loaded) -> None:
        self._torch.stop()
        # Objects from before the load may hold what stays, and are frozen.
        with all_listed():
            self._python.stop()
            self._kept_and_peak(set(loaded.inventory.storages()))

    def _kept_and_peak(self, ours: set[tuple[str, int]]) -> None:
        """Add the lines whose memory stays after the load, and those that held memory at the load's peak."""
        for place, timeline in self._timelines().items():
            device = place.replace("gpu.", "cuda:") if place != "host" else "cpu"
            others = {key: block for key, block in timeline.at_end().items() if (device, key) not in ours}
            held_by = _holders(device, others) | (self._python.holders if place == "host" else {})
            self._add(KEPT, place, [*others.values(), *(self._python.kept if place == "host" else ())], held_by)
            # The model's own weights are held at the peak as well, and are not reported.
            at_peak = [
                block for key, block in timeline.at_peak().items() if (device, key) not in ours and key not in others
            ]
            self._add("load", place, [*at_peak, *(self._python.peak if place == "host" else ())], {})

    def generating(self) -> None:
        self._torch = TorchRecorder()
        self._begin()

    def generated(self, loaded: Loaded) -> None:
        self._torch.stop()
        for place, timeline in self._timelines().items():
            self._add("generate", place, list(timeline.at_peak().values()), {})

    def fill(self, result: LoadResult) -> None:
        result.allocations = self._found

    def close(self) -> None:
        self._torch.stop()
        self._python.stop()

    def _begin(self) -> None:
        if self._is_gpu:
            gpu.start()
        self._torch.start()

    def _timelines(self) -> dict[str, Timeline]:
        gpus = {f"gpu.{index}": found for index, found in gpu.timelines().items()} if self._is_gpu else {}
        return {"host": self._torch.timeline, **gpus}

    def _add(self, moment: str, place: str, blocks: list[HeldBlock], held_by: Mapping[str, str]) -> None:
        self._found += [
            AllocationSite(moment, place, site, size, held_by.get(site, ""))
            for site, size in by_site(blocks, _MOST, _LEAST).items()
        ]


def _holders(device: str, blocks: Mapping[int, HeldBlock]) -> dict[str, str]:
    """Return, by site, what holds the tensors that it allocated, as far as Python knows them."""
    if not any(block.bytes >= _LEAST for block in blocks.values()):
        # Going through all objects takes longer than a small load.
        return {}
    sites: list[str] = []
    tensors: list[Any] = []
    for tensor in live_tensors():
        for key, _ in storages(tensor):
            block = blocks.get(key[1]) if key[0] == device else None
            # One tensor of each line is searched for.
            if block is not None and block.bytes >= _LEAST and block.site not in sites:
                sites.append(block.site)
                tensors.append(tensor)
    return dict(zip(sites, holders(tensors), strict=True))
