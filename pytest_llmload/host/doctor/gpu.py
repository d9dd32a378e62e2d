"""torch's build against the driver, bitsandbytes' binary, and who holds a GPU."""

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


def bitsandbytes() -> Iterator[Finding]:
    """Yield whether bitsandbytes has the binary that it loads beside this torch."""
    spec = find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        yield Finding("bitsandbytes", FINE, "bitsandbytes is not installed: int8, nf4 and fp4 tests are skipped")
        return
    folder = Path(spec.origin).parent
    kind, _, number = hardware.torch_build().partition(" ")
    name = f"{kind}{number.replace('.', '')}" if kind in ("cuda", "rocm") else "cpu"
    wanted = folder / f"libbitsandbytes_{name}.so"
    mend = f"{sys.executable} -m pip install --force-reinstall --no-deps bitsandbytes"
    if wanted.is_file():
        yield Finding("bitsandbytes", FINE, f"{wanted.name} is there")
        return
    others = sorted(path.name for path in folder.glob("libbitsandbytes_*.so"))
    near = [other for other in others if re.match(rf"libbitsandbytes_{kind}\d", other)]
    text = f"{wanted} is missing, which bitsandbytes loads beside a {kind} {number}".rstrip() + " build of torch"
    text += f"; it has {', '.join(others)}" if others else "; it has no binary at all"
    if near:
        digits = "".join(filter(str.isdigit, near[-1]))
        mend += f"   # or: export BNB_CUDA_VERSION={digits}"
    yield Finding("bitsandbytes", ERROR, text, mend)


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
