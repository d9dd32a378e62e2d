"""Find out this machine's hardware from the driver's library and torch's wheel, never from torch itself.

NVML opens the GPU's device files, which a process that forks must not do: the pytest process asks the driver, and sends
the answers to the processes that load.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Device, Gpu
from pytest_llmload.system.gpu_processes import memory_of

#: Memory in use on a GPU that is not held by any process: the share of driver and display.
IDLE_BYTES = 512 << 20


def torch_build() -> str:
    """Return the platform that the installed wheel was built for: ``cuda 13.0``, ``rocm 6.4``, ``cpu``, ``missing``."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "missing"
    text = (Path(spec.origin).parent / "version.py").read_text()
    for name, label in (("cuda", "cuda"), ("hip", "rocm")):
        if match := re.search(rf"^{name}\b[^=]*=\s*'([^']+)'", text, re.MULTILINE):
            return f"{label} {match[1]}"
    return "cpu"


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """Provide NVML, or None without a driver. Errors of NVML within the block are raised as MachineError."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise MachineError(
            f"the GPUs' driver (NVML) refuses an answer: {error}; see what nvidia-smi says, or measure on the CPU with "
            "--llm-device=cpu"
        ) from error


def visible_gpus() -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES shows, in order, and the driver's version. Raises MachineError."""
    with nvml() as library:
        if library is None:
            return (), ""
        handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        devices = []
        for handle in handles:
            devices += _mig_devices(library, handle) or [(handle, "")]
        gpus = [_describe(library, handle, profile) for handle, profile in devices]
        return _chosen(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")), _text(library.nvmlSystemGetDriverVersion())


def _mig_devices(library: Any, handle: Any) -> list[tuple[Any, str]]:
    try:
        current, _ = library.nvmlDeviceGetMigMode(handle)
    except library.NVMLError:
        return []  # a GPU that knows no MIG
    if not current:
        return []
    found = []
    for index in range(library.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = library.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except library.NVMLError_NotFound:
            continue
        name = _text(library.nvmlDeviceGetName(instance))
        profile = re.search(r"MIG (\S+)", name)
        found.append((instance, profile[1] if profile else "mig"))
    return found


def _describe(library: Any, handle: Any, profile: str) -> Gpu:
    parent = handle
    if profile:
        parent = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    return Gpu(
        uuid=_text(library.nvmlDeviceGetUUID(handle)),
        name=_text(library.nvmlDeviceGetName(parent)),
        total=library.nvmlDeviceGetMemoryInfo(handle).total,
        capability=tuple(library.nvmlDeviceGetCudaComputeCapability(parent)),
        mig_profile=profile,
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _chosen(gpus: list[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """Read CUDA_VISIBLE_DEVICES as CUDA does: indices or UUID prefixes, up to the first that does not exist."""
    names = [gpu.uuid for gpu in gpus] if visible is None else [name.strip() for name in visible.split(",")]
    chosen: list[Gpu] = []
    for name in names:
        if name.isdecimal():
            match = gpus[int(name)] if int(name) < len(gpus) else None
        else:
            match = next((gpu for gpu in gpus if name and gpu.uuid.startswith(name)), None)
        if match is None:
            break
        chosen.append(Gpu(**{**match.__dict__, "index": len(chosen)}))
    return tuple(chosen)


def detect(wanted: str) -> Device:
    """Return the device of this run. Raises MachineError if GPU and torch build do not fit, rather than use the CPU."""
    build = torch_build()
    cpu = Device(kind="cpu", key=f"cpu-{platform.machine()}")
    if wanted == "cpu":
        return cpu
    gpus, driver = visible_gpus()
    if gpus and build.startswith("cuda"):
        return Device(kind="cuda", key=_key(gpus[0]), gpus=gpus, driver=driver)
    use_cpu = "--llm-device=cpu measures on the CPU"
    if Path("/dev/kfd").exists():
        raise MachineError(
            f"an AMD GPU is here (torch build: {build}), which this version cannot identify or measure; {use_cpu}"
        )
    if gpus:
        raise MachineError(
            f"{gpus[0].name} is visible, but the installed torch is {_called(build)}: install a CUDA build; {use_cpu}"
        )
    if build.startswith(("cuda", "rocm")):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else ""
        raise MachineError(f"the installed torch is {_called(build)}, but no GPU is visible{why}; {use_cpu}")
    if wanted == "cuda":
        raise MachineError(f"--llm-device=cuda, but no GPU is visible and the installed torch is {_called(build)}")
    return cpu


def _called(build: str) -> str:
    return "missing" if build == "missing" else f"a {build} build"


def _key(gpu: Gpu) -> str:
    name = re.sub(r"[^a-z0-9.]+", "-", gpu.name.lower()).strip("-")
    return f"{name}-mig-{gpu.mig_profile}" if gpu.mig_profile else name


def used_by(gpu: Gpu, pid: int) -> int:
    """Return the bytes of a GPU that a process of this machine uses; 0 if the driver does not list it with its memory.

    Raises MachineError if the driver does not tell.
    """
    with nvml() as library:
        if library is None:
            return 0
        return next(iter(memory_of((pid,), library.nvmlDeviceGetHandleByUUID(gpu.uuid))), 0)


def holders(gpu: Gpu, own: Collection[int] = ()) -> list[str]:
    """Return the other users of a GPU: processes by pid and name with their bytes, or the bytes alone without pids.

    The driver may hide the pids. The result leaves out this process itself, which has loaded before under inline
    isolation, and ``own``, processes of this run. Raises MachineError if the driver does not tell.
    """
    from pytest_llmload.core.units import format_bytes

    with nvml() as library:
        if library is None:
            return []
        handle = library.nvmlDeviceGetHandleByUUID(gpu.uuid)
        processes = library.nvmlDeviceGetComputeRunningProcesses(handle)
        found = []
        for process in processes:
            if process.pid in (os.getpid(), *own):
                continue
            used = format_bytes(process.usedGpuMemory) if process.usedGpuMemory else "an unknown amount"
            found.append(f"pid {process.pid} ({_command(process.pid)}) with {used}")
        if not processes:
            used = library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2).used
            if used > IDLE_BYTES:
                found.append(f"a process outside this container with {format_bytes(used)}")
        return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "of another container or user"


def host_memory() -> int:
    """Return the bytes of RAM that this process may use: the machine's, or its cgroup's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        return min(total, int(text))
    return total


def oom_kills() -> int:
    """Return how often the kernel has killed a process because memory ran out, since boot."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0
