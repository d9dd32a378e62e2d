"""The built-in probes, by the group of figures that they measure.

Import it in the load's process only, and after the libraries, since probes import torch.
"""

from __future__ import annotations

from collections.abc import Iterable

from pytest_llmload.core.job import ALLOCATIONS, GENERATION_TIME, LOAD_TIME, MEMORY, TIMING, WORK
from pytest_llmload.probes.allocations.probe import Allocations
from pytest_llmload.probes.base import Probe
from pytest_llmload.probes.driver import Driver
from pytest_llmload.probes.gpu_memory import GpuMemory
from pytest_llmload.probes.gpu_timeline import GpuTimeline
from pytest_llmload.probes.growth import Growth
from pytest_llmload.probes.host_memory import HostMemory
from pytest_llmload.probes.load_control import LoadControl
from pytest_llmload.probes.load_phases import LoadPhases
from pytest_llmload.probes.manifest import Manifest
from pytest_llmload.probes.model_settings import ModelSettings
from pytest_llmload.probes.numbers import OutputNumbers
from pytest_llmload.probes.other_tensors import OtherTensors
from pytest_llmload.probes.rounds import Rounds
from pytest_llmload.probes.timing import GenerationTimes
from pytest_llmload.probes.weights import Weights
from pytest_llmload.probes.work import Work

#: Group of figures -> its probes in the order they run. Those that read the allocators come first, so that what the
#: others allocate is never part of a figure; no group that reads memory contains a control's memory.
GROUPS: dict[str, tuple[type[Probe], ...]] = {
    MEMORY: (
        *(GpuMemory, HostMemory, Weights, Driver, Manifest, OtherTensors, OutputNumbers, LoadPhases, GpuTimeline),
        *(ModelSettings, Growth),
    ),
    TIMING: (GenerationTimes,),
    LOAD_TIME: (LoadPhases, LoadControl),
    GENERATION_TIME: (Rounds,),
    WORK: (Work,),
    ALLOCATIONS: (Allocations,),
}


def probes_for(figures: Iterable[str]) -> list[type[Probe]]:
    """Return the probes of some groups of figures, each once, in the order they run."""
    return list(dict.fromkeys(probe for group in figures for probe in GROUPS[group]))
