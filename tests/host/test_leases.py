"""Who gets which GPU, without any: the locks are real, and what the driver says is made up."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
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


@pytest.fixture(autouse=True)
def _own_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from those of other runs of these tests on this machine."""
    monkeypatch.setattr(gpu_leases, "_NAME", f"llmload-tests-{os.getpid()}")


@pytest.fixture
def used_by(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """GPU -> who else uses it, as the driver says."""
    users: dict[str, list[str]] = {}
    monkeypatch.setattr(hardware, "holders", lambda gpu, own=(): users.get(gpu.uuid, []))
    return users


def lease(count: int = 1, wait_foreign: float = 0.0, wait_lock: float = 0.0) -> gpu_leases.Lease:
    return gpu_leases.lease(DEVICE, count, wait_foreign=wait_foreign, wait_lock=wait_lock)


def test_unused_gpus_come_first(used_by: dict[str, list[str]]) -> None:
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
    monkeypatch.setattr(time, "sleep", lambda seconds: used_by.pop("GPU-1"))
    held = lease(wait_foreign=60.0)
    assert [gpu.uuid for gpu in held.gpus] == ["GPU-1"]
    held.release()


def test_a_driver_that_refuses_an_answer_is_an_error_of_the_machine_and_locks_nothing(
    monkeypatch: pytest.MonkeyPatch,
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


def test_this_process_is_not_another_user_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_lease_ends_with_its_holder_and_leaves_no_file(used_by: dict[str, list[str]], tmp_path: Path) -> None:
    """Killed, and with a TMPDIR of its own: the kernel frees what it held."""
    code = (
        "import sys; from pytest_llmload.core.job import Gpu; from pytest_llmload.host.loads import gpu_leases; "
        "gpu_leases._NAME = sys.argv[1]; held = gpu_leases._taken(Gpu('GPU-0', 'NVIDIA H100', 80 << 30, (9, 0))); "
        "print(held is not None, flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, gpu_leases._NAME],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    held = lease()
    assert [gpu.uuid for gpu in held.gpus] == ["GPU-1"]
    held.release()
    holder.kill()
    holder.wait()
    holder.communicate()
    lease(2).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_the_kernel_refuses_is_an_error_of_the_machine(used_by: dict[str, list[str]]) -> None:
    endless = dataclasses.replace(GPUS[0], uuid="GPU-" + "0" * 200)
    with pytest.raises(MachineError, match=r"NVIDIA H100 \(GPU-0+\) cannot be locked: "):
        gpu_leases._taken(endless)
