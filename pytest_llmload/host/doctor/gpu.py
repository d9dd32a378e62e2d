"""Check torch's build against the driver, the compiled libraries of quantisers, and which processes hold a GPU."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.units import format_bytes
from pytest_llmload.host.doctor.finding import ERROR, FINE, WARNING, Finding
from pytest_llmload.host.loads import hardware
from pytest_llmload.quantisation.base import Method
from pytest_llmload.quantisation.builtin import BUILTIN

_WHEELS = "https://download.pytorch.org/whl"


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
    install = f"{sys.executable} -m pip install torch"
    if build == "missing":
        yield Finding("torch", ERROR, "torch is not installed", f"{install} --index-url {_WHEELS}/cpu")
        return
    try:
        gpus, driver = hardware.visible_gpus()
        newest = driver_cuda()
    except MachineError as error:
        yield Finding("torch", ERROR, str(error), "nvidia-smi")
        return
    kind, _, number = build.partition(" ")
    if gpus and kind == "cpu":
        wheel = f"cu{newest[0]}{newest[1]}" if newest else "cu126"
        text = f"{gpus[0].name} is visible, and the installed torch is a CPU build"
        yield Finding("torch", ERROR, text, f"{install} --force-reinstall --index-url {_WHEELS}/{wheel}")
    elif kind == "cuda" and newest is not None and int(number.split(".")[0]) > newest[0]:
        text = f"torch is built for CUDA {number}, and the driver {driver} runs CUDA {newest[0]}.{newest[1]} at most"
        wheel = f"cu{newest[0]}{newest[1]}"
        yield Finding("torch", ERROR, text, f"{install} --force-reinstall --index-url {_WHEELS}/{wheel}")
    elif kind == "cuda" and not gpus:
        yield Finding("torch", WARNING, f"torch is built for CUDA {number}, and no GPU is visible", "nvidia-smi")
    else:
        seen = ", ".join(f"{gpu.name} ({format_bytes(gpu.total)})" for gpu in gpus) or "no GPU"
        yield Finding("torch", FINE, f"a {build} build; {seen}" + (f", driver {driver}" if driver else ""))


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
    mend = f"{sys.executable} -m pip install --force-reinstall --no-deps {name}"
    others = sorted(path.name for path in folder.glob(method.binary.format(build="*")))
    digits = re.findall(method.binary.format(build=rf"{kind}(\d+)"), " ".join(others))
    text = f"{wanted} is missing, which {name} loads beside a {kind} {number}".rstrip() + " build of torch"
    text += f"; it has {', '.join(others)}" if others else "; it has no binary at all"
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
