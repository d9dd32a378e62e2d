"""The GPUs that loads can be predicted for: what no baseline says of them.

Imported by pytest too: no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llmload.core.job import Device, Gpu

MIB = 1 << 20
#: What a prediction gates.
PREDICTED = (
    "gpu.weights",
    "gpu.settled",
    "gpu.load_allocated",
    "gpu.load_allocations",
    "gpu.load_peak",
    "gpu.generate_peak",
    "gpu.reserved_peak",
)
#: GPUs of a predicted machine: as many as one load can ask for.
COUNT = 8


@dataclass(frozen=True)
class Model:
    """A model of GPU, by what its driver says."""

    name: str
    #: Bytes, as the driver's library says them.
    total: int
    capability: tuple[int, int]
    processors: int
    #: Bytes of the CUDA context, as in the baselines recorded there (``gpu.context``).
    context: int


#: By the device key of the baselines: those on which traces were held against measurements (docs/prediction.md).
MODELS = {
    "nvidia-h100-80gb-hbm3": Model("NVIDIA H100 80GB HBM3", 81559 * MIB, (9, 0), 132, 543162368),
    "nvidia-h200": Model("NVIDIA H200", 143771 * MIB, (9, 0), 132, 543162368),
}


def predicted_device(key: str) -> Device:
    """Return a machine with GPUs of a device key. Raises ValueError for one that is not known."""
    if key not in MODELS:
        raise ValueError(f"loads cannot be predicted for {key!r}: known are {', '.join(MODELS)}")
    model = MODELS[key]
    gpus = tuple(Gpu(f"predicted-{index}", model.name, model.total, model.capability, index) for index in range(COUNT))
    return Device("cuda", key, gpus)
