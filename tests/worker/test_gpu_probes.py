"""The GPU probes' logic, with stand-ins for the allocator and the driver."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loads import checkpoint

from pytest_llmload.core.job import Device, Gpu, Job
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.probes import gpu_timeline
from pytest_llmload.probes.driver import Driver
from pytest_llmload.probes.gpu_memory import GpuMemory
from pytest_llmload.worker.model.device import create_context, is_out_of_memory

MIB = 1 << 20
GPUS = tuple(Gpu(f"GPU-{letter * 8}", "H100", 80 << 30, (9, 0), index) for index, letter in enumerate("ab"))


def gpu_job(count: int = 2) -> Job:
    spec = LoadSpec(model="x", name="x", gpu_count=count)
    return Job(spec, Device("cuda", "nvidia-h100", GPUS[:count], "580.1"), checkpoint("tiny-llama"))


class Allocator:
    """torch's counters of some GPUs, in bytes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.now = [0] * count
        self.peak = [0] * count
        self.reserved = [0] * count
        self.reserved_peak = [0] * count
        self.ever = [(0, 0)] * count

    def allocate(self, gpu: int, size: int) -> None:
        self.now[gpu] += size
        self.peak[gpu] = max(self.peak[gpu], self.now[gpu])
        self.reserved[gpu] = max(self.reserved[gpu], self.now[gpu])
        self.reserved_peak[gpu] = max(self.reserved_peak[gpu], self.reserved[gpu])
        self.ever[gpu] = (self.ever[gpu][0] + size, self.ever[gpu][1] + 1)

    def free(self, gpu: int, size: int) -> None:
        self.now[gpu] -= size

    def reset(self, gpu: int) -> None:
        self.peak[gpu], self.reserved_peak[gpu] = self.now[gpu], self.reserved[gpu]

    def stats(self, gpu: int) -> dict[str, int]:
        size, count = self.ever[gpu]
        return {"requested_bytes.all.allocated": size, "allocation.all.allocated": count}

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        uuid = [SimpleNamespace(uuid=gpu.uuid.partition("-")[2]) for gpu in GPUS]
        for name, value in {
            "device_count": lambda: self.count,
            "is_available": lambda: True,
            "synchronize": lambda gpu: None,
            "memory_stats": self.stats,
            "reset_peak_memory_stats": self.reset,
            "memory_allocated": lambda gpu: self.now[gpu],
            "memory_reserved": lambda gpu: self.reserved[gpu],
            "max_memory_allocated": lambda gpu: self.peak[gpu],
            "max_memory_reserved": lambda gpu: self.reserved_peak[gpu],
            "get_device_properties": lambda gpu: uuid[gpu],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator(2)
    found.install(monkeypatch)
    return found


NOTHING: Any = None


def test_figures_of_each_gpu_and_their_sums(allocator: Allocator) -> None:
    probe = GpuMemory(gpu_job())
    allocator.allocate(0, 50 * MIB)
    allocator.free(0, 50 * MIB)
    probe.device_ready()
    probe.mark()
    allocator.allocate(0, 100 * MIB)
    allocator.free(0, 100 * MIB)
    allocator.allocate(0, 40 * MIB)
    allocator.allocate(1, 30 * MIB)
    probe.loaded(NOTHING)
    allocator.allocate(1, 500 * MIB)
    allocator.free(1, 500 * MIB)
    probe.forwarding()
    allocator.allocate(0, 5 * MIB)
    probe.forwarded(NOTHING)
    probe.generating()
    allocator.allocate(0, 10 * MIB)
    allocator.allocate(1, 10 * MIB)
    probe.generated(NOTHING)
    result = LoadResult({}, "loaded")
    probe.fill(result)
    metrics = {name: value / MIB for name, value in result.metrics.items()}
    assert metrics["gpu.settled"] == 70
    assert metrics["gpu.0.settled"] == 40
    assert metrics["gpu.1.settled"] == 30
    assert metrics["gpu.0.load_peak"] == 100
    assert metrics["gpu.load_peak"] == 130
    assert metrics["gpu.0.load_allocated"] == 140
    assert result.metrics["gpu.load_allocations"] == 3
    # What a check allocated between the load and the forward is in no peak of allocation.
    assert metrics["gpu.forward_peak"] == 45 + 30
    assert metrics["gpu.generate_peak"] == 55 + 40
    assert metrics["gpu.1.reserved_peak"] == 530
    assert result.phase_peaks["load"] == {"gpu.0": 100 * MIB, "gpu.1": 30 * MIB}


def test_a_cpu_run_has_no_gpu_figures() -> None:
    probe = GpuMemory(Job(LoadSpec(model="x", name="x"), Device("cpu", "cpu-x86_64"), checkpoint("tiny-llama")))
    for moment in (probe.mark, probe.forwarding, probe.generating):
        moment()
    probe.loaded(NOTHING)
    result = LoadResult({}, "loaded")
    probe.fill(result)
    assert result.metrics == {}


class Nvml:
    """The driver's view, by UUID."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.used = {gpu.uuid: 400 * MIB for gpu in GPUS}
        #: (pid, bytes) of each process.
        self.processes: dict[str, list[tuple[int, int | None]]] = {gpu.uuid: [] for gpu in GPUS}

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self.used[handle])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes[handle]]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch, allocator: Allocator) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


def drive(probe: Driver, nvml: Nvml, allocator: Allocator, pid: int, figure: bool = True) -> LoadResult:
    """A context of 500 MiB, a load of 1000 MiB with 100 MiB of reserve, and 60 MiB of kernels, on the first GPU."""
    uuid = GPUS[0].uuid
    probe.start()
    allocator.reserved[0] = 2 * MIB
    nvml.used[uuid] += 502 * MIB
    nvml.processes[uuid].append((pid, 502 * MIB if figure else 0))
    probe.device_ready()
    probe.mark()
    allocator.allocate(0, 1000 * MIB)
    allocator.reserved[0] = 1100 * MIB
    nvml.used[uuid] += (1098 + 60) * MIB
    nvml.processes[uuid][-1] = (pid, (502 + 1098 + 60) * MIB if figure else 0)
    probe.generated(NOTHING)
    result = LoadResult({}, "loaded", metrics={"gpu.0.weights": 900 * MIB})
    probe.fill(result)
    return result


ROW = {"weights": 900, "rest": 100, "reserved": 100, "context": 500, "other": 60, "process": 1660}


def in_mib(row: dict[str, float]) -> dict[str, float]:
    return {name: value / MIB for name, value in row.items() if name in ROW}


def test_the_ledger_adds_up_to_the_drivers_figure(nvml: Nvml, allocator: Allocator) -> None:
    allocator.count = 1
    result = drive(Driver(gpu_job(1)), nvml, allocator, os.getpid())
    assert result.metrics["gpu.process"] == result.metrics["gpu.0.process"] == 1660 * MIB
    assert result.metrics["gpu.context"] == 500 * MIB
    (row,) = result.ledger
    assert in_mib(row) == ROW
    assert row["process"] == sum(row[name] for name in ("weights", "rest", "reserved", "context", "other"))
    assert row["by_difference"] == 0


@pytest.mark.parametrize("figure", [True, False])
def test_in_a_container_the_figure_is_unavailable_and_the_ledger_goes_by_difference(
    nvml: Nvml, allocator: Allocator, figure: bool
) -> None:
    allocator.count = 1
    pid = os.getpid() + 1 if figure else os.getpid()
    result = drive(Driver(gpu_job(1)), nvml, allocator, pid, figure)
    reason = "different PID namespace" if figure else "no figure for this process"
    assert reason in result.unavailable["gpu.process"]
    assert reason in result.unavailable["gpu.context"]
    assert "gpu.process" not in result.metrics
    (row,) = result.ledger
    assert in_mib(row) == ROW
    assert row["by_difference"] == 1


def test_no_ledger_by_difference_where_others_use_the_gpu(nvml: Nvml, allocator: Allocator) -> None:
    allocator.count = 1
    nvml.processes[GPUS[0].uuid].append((1, 7 * MIB))
    result = drive(Driver(gpu_job(1)), nvml, allocator, os.getpid() + 1)
    assert result.ledger == []
    assert any("other processes use it" in note for note in result.notes)


def test_a_number_that_only_looks_like_ours_is_not_believed(nvml: Nvml, allocator: Allocator) -> None:
    allocator.count = 1
    probe = Driver(gpu_job(1))
    probe.start()
    nvml.processes[GPUS[0].uuid].append((os.getpid(), 5 * MIB))
    allocator.allocate(0, 900 * MIB)
    probe.device_ready()
    probe.mark()
    probe.generated(NOTHING)
    result = LoadResult({}, "loaded")
    probe.fill(result)
    assert "smaller than what torch holds" in result.unavailable["gpu.process"]


def test_no_nvml_is_a_reason(monkeypatch: pytest.MonkeyPatch, allocator: Allocator) -> None:
    broken = Nvml()

    def nvml_init() -> None:
        raise Nvml.NVMLError("Driver Not Loaded")

    monkeypatch.setattr(broken, "nvmlInit", nvml_init)
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    probe = Driver(gpu_job())
    probe.start()
    probe.device_ready()
    probe.mark()
    probe.generated(NOTHING)
    result = LoadResult({}, "loaded")
    probe.fill(result)
    assert result.unavailable == {"gpu.process": "NVML: Driver Not Loaded", "gpu.context": "NVML: Driver Not Loaded"}


def test_a_gpu_that_torch_does_not_see_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the load is for a GPU, but torch"):
        create_context(gpu_job())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_memory_over_time_is_taken_while_the_load_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(2)
    allocator.install(monkeypatch)
    looks = threading.Semaphore(0)

    def nested(gpu: int) -> dict[str, Any]:
        looks.release()
        return {"allocated_bytes": {"all": {"current": allocator.now[gpu]}}}

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", nested)
    monkeypatch.setattr(gpu_timeline, "INTERVAL", 0.001)
    monkeypatch.setattr(gpu_timeline, "POINTS", 8)
    probe = gpu_timeline.GpuTimeline(gpu_job())
    probe.start()
    probe.device_ready()
    probe.mark()
    probe.loading()
    allocator.allocate(1, 7 * MIB)
    for _ in range(40):
        assert looks.acquire(timeout=60)
    allocator.allocate(0, 5 * MIB)
    probe.loaded(None)  # type: ignore[arg-type]
    assert threading.active_count() == 1 or probe.thread is None
    result = LoadResult({}, "loaded")
    probe.fill(result)
    one, two = result.timeline["gpu.0"], result.timeline["gpu.1"]
    assert one[-1][1] == 5 * MIB
    assert max(size for _, size in two) == 7 * MIB
    assert 2 <= len(one) <= 8
    assert [moment for moment, _ in one] == sorted(moment for moment, _ in one)


def test_a_load_that_never_began_has_no_memory_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    Allocator(1).install(monkeypatch)
    probe = gpu_timeline.GpuTimeline(gpu_job(1))
    probe.start()
    probe.device_ready()
    probe.mark()
    result = LoadResult({}, "failed")
    probe.fill(result)
    assert result.timeline == {}
