"""Check torch's build against the driver, the compiled libraries of quantisers, and which processes hold a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.units import format_bytes
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding
from pytest_llmload.host.doctor.python import installed_version, installs
from pytest_llmload.host.loads import hardware
from pytest_llmload.quantisation.base import Method
from pytest_llmload.quantisation.builtin import BUILTIN
from pytest_llmload.reports.layout import joined

_WHEELS = "https://download.pytorch.org/whl"
#: Versions of CUDA that torch's releases are built for, the newest first.
_BUILDS = ((13, 0), (12, 8), (12, 6), (12, 4), (12, 1), (11, 8))
#: Binaries of other builds that a finding names.
_OTHERS = 4


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver can run; None without a driver. Raises MachineError."""
    with hardware.nvml() as library:
        if library is None:
            return None
        number = int(library.nvmlSystemGetCudaDriverVersion_v2())
        return number // 1000, number % 1000 // 10


def torch_build() -> Iterator[Finding]:
    """Yield whether the installed torch can use the GPUs that are here."""
    build = hardware.torch_build()
    if build == "missing":
        yield Finding("torch", ERROR, "torch is not installed", installs(f"torch --index-url {_WHEELS}/cpu"))
        return
    try:
        gpus, driver = hardware.visible_gpus()
        newest = driver_cuda()
    except MachineError as error:
        yield Finding("torch", ERROR, str(error), "nvidia-smi")
        return
    kind, _, number = build.partition(" ")
    if gpus and kind == "cpu":
        text = f"{gpus[0].name} is visible, and the installed torch is a CPU build"
        yield Finding("torch", ERROR, text, _reinstall(newest))
    elif kind == "cuda" and newest is not None and int(number.split(".")[0]) > newest[0]:
        text = f"torch is built for CUDA {number}, and the driver {driver} runs CUDA {newest[0]}.{newest[1]} at most"
        yield Finding("torch", ERROR, text, _reinstall(newest))
    elif kind == "cuda" and not gpus:
        yield Finding("torch", WARNING, f"torch is built for CUDA {number}, and no GPU is visible", "nvidia-smi")
    else:
        seen = ", ".join(f"{gpu.name} ({format_bytes(gpu.total)})" for gpu in gpus) or "no GPU"
        yield Finding("torch", FINE, f"a {build} build; {seen}" + (f", driver {driver}" if driver else ""))


def _reinstall(newest: tuple[int, int] | None) -> str:
    """Return the command that installs the newest build of torch that the driver runs."""
    major, minor = next((build for build in _BUILDS if newest is None or build <= newest), _BUILDS[-1])
    return installs(f"torch --force-reinstall --index-url {_WHEELS}/cu{major}{minor}")


def binaries() -> Iterator[Finding]:
    """Yield, for each quantiser with a compiled library for single builds of torch, whether it has the one for ours."""
    for method in BUILTIN:
        if method.binary:
            yield _binary(method)


def _binary(method: type[Method]) -> Finding:
    name = method.name
    spec = find_spec(method.packages[0])
    if spec is None or spec.origin is None:
        schemes = ", ".join(scheme.name for scheme in method.schemes)
        return Finding(name, FINE, f"{name} is not installed: tests with quant({schemes}) are skipped")
    folder = Path(spec.origin).parent
    kind, _, number = hardware.torch_build().partition(" ")
    build = f"{kind}{number.replace('.', '')}" if kind in ("cuda", "rocm") else "cpu"
    wanted = folder / method.binary.format(build=build)
    if wanted.is_file():
        return Finding(name, FINE, f"{wanted.name} is there")
    have = installed_version(name)
    mend = installs(f"--force-reinstall --no-deps {name}{f'=={have}' if have else ''}")
    others = sorted(path.name for path in folder.glob(method.binary.format(build="*")))
    digits = re.findall(method.binary.format(build=rf"{kind}(\d+)"), " ".join(others))
    text = f"{wanted} is missing, which {name} loads beside a {kind} {number}".rstrip() + " build of torch"
    text += f"; it has {joined(others, _OTHERS)}" if others else "; it has no binary at all"
    if digits and method.binary_variable:
        mend += f"   # or: export {method.binary_variable}={digits[-1]}"
    return Finding(name, ERROR, text, mend)


def holders() -> Iterator[Finding]:
    """Yield the GPUs that other processes hold."""
    try:
        gpus, _ = hardware.visible_gpus()
        for gpu in gpus:
            if found := hardware.holders(gpu):
                pids = re.findall(r"pid (\d+)", " ".join(found))
                mend = f"ps -o pid,user,lstart,cmd -p {','.join(pids)}" if pids else "nvidia-smi"
                text = f"GPU {gpu.index} ({gpu.name}) is held by {', '.join(found)}: memory and times would be wrong"
                yield Finding("gpu", ERROR, text, f"{mend}   # or: pytest … --llm-wait-gpu=5min")
    except MachineError as error:
        yield Finding("gpu", ERROR, str(error), "nvidia-smi")
