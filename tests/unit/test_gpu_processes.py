"""The memory that the driver counts for processes, where it lists them, hides them or gives no figure."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pynvml
import pytest

from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.host.loads import hardware
from pytest_llmload.process.serving import memory
from pytest_llmload.system.gpu_processes import memory_of

GPU = Gpu(uuid="GPU-0", name="NVIDIA H200", total=80 << 30, capability=(9, 0))
OWN, OTHER = os.getpid(), 1


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> dict[int, int | None]:
    """The driver's list: pid -> bytes."""
    found: dict[int, int | None] = {}
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetComputeRunningProcesses",
        lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in found.items()],
    )
    return found


@pytest.mark.parametrize(
    ("rows", "own", "reason"),
    [
        ({OTHER: 7, OWN: 5}, [5], ""),
        ({OWN: 0}, [0], "the driver gives no figure for a process of the server"),
        ({OWN: None}, [0], "the driver gives no figure for a process of the server"),
        ({OTHER: 7}, [], "the driver does not list any process of the server on GPU 0"),
    ],
)
def test_every_reader_sees_the_same_list(
    rows: dict[int, int | None], own: list[int], reason: str, listed: dict[int, int | None]
) -> None:
    listed |= rows
    assert memory_of({OWN}, GPU.uuid) == own
    assert hardware.used_by(GPU, OWN) == sum(own)
    found, why = memory.on_gpus(OWN, Device(kind="cuda", key="h200", gpus=(GPU,)))
    assert (found, why[: len(reason)]) == ({} if reason else {0: sum(own)}, reason)
    assert bool(why) == bool(reason)


def test_the_memory_of_a_tree_is_the_sum(listed: dict[int, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "tree", lambda root: [root, OTHER])
    listed |= {OWN: 5, OTHER: 7, 2: 11}
    assert memory.on_gpus(OWN, Device(kind="cuda", key="h200", gpus=(GPU,))) == ({0: 12}, "")
