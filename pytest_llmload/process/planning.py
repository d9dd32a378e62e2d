"""Answer ``llmload plan``: a process that may import torch reads one question from its input and prints the answer."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.job import Gpu
from pytest_llmload.core.spec import Workload
from pytest_llmload.system.disk_speed import read_speed


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return the overview of a model, with the seconds that planning took and the disk's speed where weights are here.

    Raises ValueError, LoadFailed or MachineError, in one sentence.
    """
    from pytest_llmload.worker.checkpoints.headers import weight_files
    from pytest_llmload.worker.planning.overview import outline, overview, stored_bytes

    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in question["gpus"])
    trusted = question["trust_remote_code"]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        directory = outline(question["model"], Path(folder), trust_remote_code=trusted)
        workload = Workload.parse(question["workload"])
        found = overview(question["model"], directory, gpus, workload, trust_remote_code=trusted)
        seconds = time.perf_counter() - begin
        stored = stored_bytes(directory)
        speed = read_speed(weight_files(directory)) if stored and question["measure"] else 0.0
    return {"overview": asdict(found), "seconds": seconds, "stored": stored, "bandwidth": speed}


def main() -> int:
    """Answer the question on the input; an error is an answer too."""
    try:
        told: dict[str, Any] = answer(json.load(sys.stdin))
    except (ValueError, ImportError, LoadFailed, MachineError, OSError) as error:
        told = {"error": next(iter(str(error).splitlines()), type(error).__name__)}
    print(f"\n{json.dumps(told)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
