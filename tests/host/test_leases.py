"""Who gets which GPU, without any: the locks are real, and what the driver says is made up."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from pytest_llmload import MachineError
from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.host.loads import gpu_leases, hardware

GPUS = tuple(Gpu(f"GPU-{index}", "NVIDIA H100", 80 << 30, (9, 0), index) for index in range(2))
DEVICE = Device("cuda", "nvidia-h100", GPUS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "pytest-llmload-gpus"


@pytest.fixture
def used_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """GPU -> who else uses it, as the driver says."""
    users: dict[str, list[str]] = {}
    monkeypatch.setattr(hardware, "holders", lambda gpu: users.get(gpu.uuid, []))
    return users


def lease(count: int = 1, wait_foreign: float = 0.0, wait_lock: float = 0.0) -> gpu_leases.Lease:
    return gpu_leases.lease(DEVICE, count, wait_foreign=wait_foreign, wait_lock=wait_lock)


def test_gpus_that_nobody_uses_come_first(used_by: dict[str, list[str]]) -> None:
    used_by["GPU-0"] = ["pid 7 (python) with 1 GiB"]
    held = lease()
    assert [gpu.uuid for gpu in held.gpus] == ["GPU-1"]
    with pytest.raises(MachineError, match="1 of 2 GPUs are wanted, and other loads hold them"):
        # GPU 0 is not this run's to wait for while GPU 1 will be free.
        lease()
    held.release()
    with pytest.raises(MachineError, match=r"\(GPU-0\) is in use by pid 7 \(python\) with 1 GiB: .*--llm-wait-gpu"):
        lease(2)
    used_by.clear()
    lease(2).release()


def test_a_gpu_that_another_process_leaves_meanwhile_is_taken(
    used_by: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    used_by |= {"GPU-0": ["pid 7"], "GPU-1": ["pid 8"]}
    monkeypatch.setattr(gpu_leases.time, "sleep", lambda seconds: used_by.pop("GPU-1"))
    held = lease(wait_foreign=60.0)
    assert [gpu.uuid for gpu in held.gpus] == ["GPU-1"]
    held.release()


def test_a_driver_that_refuses_an_answer_is_an_error_of_the_machine_and_locks_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> Any:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lost)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lost)
    with pytest.raises(MachineError, match=r"refuses an answer: GPU is lost; .*--llm-device=cpu"):
        hardware.visible_gpus()
    with pytest.raises(MachineError, match="refuses an answer: GPU is lost"):
        lease(2)
    monkeypatch.setattr(hardware, "holders", lambda gpu: [])
    lease(2).release()


def test_this_process_is_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under inline isolation, pytest itself has loaded before."""
    running = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=9 << 30)]
    for name in ("nvmlInit", "nvmlShutdown"):
        monkeypatch.setattr(pynvml, name, lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda handle: running)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle, version: SimpleNamespace(used=10 << 30))
    assert hardware.holders(GPUS[0]) == []
    running.append(SimpleNamespace(pid=1, usedGpuMemory=1 << 30))
    (other,) = hardware.holders(GPUS[0])
    assert other.startswith("pid 1 (")
    running.clear()
    assert hardware.holders(GPUS[0]) == ["a process outside this container with 10.00 GiB"]


def test_every_user_may_lock_whatever_the_umask(folder: Path, used_by: dict[str, list[str]]) -> None:
    before = os.umask(0o027)
    try:
        lease().release()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert (folder / "GPU-0.lock").stat().st_mode & 0o777 == 0o666


def test_locks_that_cannot_be_written_are_an_error_of_the_machine(folder: Path, used_by: dict[str, list[str]]) -> None:
    folder.mkdir()
    (folder / "GPU-0.lock").mkdir()
    with pytest.raises(MachineError, match=r"cannot be locked .*-gpus: Is a directory; every user .* \(mode 1777\)$"):
        lease()
    (folder / "GPU-0.lock").rmdir()
    folder.rmdir()
    folder.parent.rmdir()
    with pytest.raises(MachineError, match="No such file or directory"):
        lease()
