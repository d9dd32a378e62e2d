"""The GPUs that loads can be predicted for, with their properties that baselines do not record.

pytest imports this module too, so that it must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_llmload.core.job import Device, Gpu

MIB = 1 << 20
#: The metrics that a prediction gates.
PREDICTED = (
    "gpu.weights",
    "gpu.settled",
    "gpu.load_allocated",
    "gpu.load_allocations",
    "gpu.load_peak",
    "gpu.generate_peak",
    "gpu.reserved_peak",
)
#: The number of GPUs of a predicted machine, which is the most that one load can request.
COUNT = 8


@dataclass(frozen=True)
class GpuModel:
    """A GPU model, as its driver describes it."""

    name: str
    #: Total memory in bytes, as the driver's library reports it.
    total: int
    capability: tuple[int, int]
    processors: int
    #: Bytes of the CUDA context, as in the baselines recorded on this GPU (``gpu.context``).
    context: int


#: Device key of the baselines -> GPU. Traces were compared with measurements on each of them (docs/prediction.md).
MODELS = {
    "nvidia-h100-80gb-hbm3": GpuModel("NVIDIA H100 80GB HBM3", 81559 * MIB, (9, 0), 132, 543162368),
    "nvidia-h200": GpuModel("NVIDIA H200", 143771 * MIB, (9, 0), 132, 543162368),
}


def predicted_device(key: str) -> Device:
    """Return a machine with GPUs of a device key. Raises ValueError if the key is unknown."""
    if key not in MODELS:
        raise ValueError(f"loads cannot be predicted for {key!r}; use one of {', '.join(MODELS)}")
    model = MODELS[key]
    gpus = tuple(Gpu(f"predicted-{index}", model.name, model.total, model.capability, index) for index in range(COUNT))
    return Device("cuda", key, gpus)
