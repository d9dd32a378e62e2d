"""Predict every committed single-GPU baseline and print how far off each figure is.

    python benchmarks/predict_baselines.py [PATTERN ...]

Run it with the libraries that recorded the baselines (their environment is in each file): a trace is of the installed
ones. No GPU and no weights are needed. ``--measured DIR`` reads what ``predict_gpu.py`` measured instead of baselines.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from predict_gpu import CASES, config_of

from pytest_llmload.core.job import Adapter, Checkpoint, Device, Job
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.prediction.devices import PREDICTED, predicted_device

DEVICE = "nvidia-h100-80gb-hbm3"
#: Largest difference that is accepted, by metric; the others are exact.
BOUNDS = {"gpu.load_peak": 0.02, "gpu.generate_peak": 0.02, "gpu.reserved_peak": 0.05}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--measured", type=Path)
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "predict-baselines")
    options = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    print("| load | " + " | ".join(name.removeprefix("gpu.") for name in PREDICTED) + " | CPU s |")
    print("| --- |" + " ---: |" * (len(PREDICTED) + 1))
    misses = 0
    for name, model, fields, workload, recorded in cases(options.measured):
        if not any(fnmatch.fnmatch(name, pattern) for pattern in options.patterns):
            continue
        begin = time.process_time()
        result = predicted(model, fields, workload, options.cache_dir)
        cells = [cell(metric, recorded.get(metric), result) for metric in PREDICTED]
        misses += sum("**" in text for text in cells)
        print(f"| {name} | {' | '.join(cells)} | {time.process_time() - begin:.0f} |", flush=True)
        if result.unavailable or result.problems:
            print(f"  {result.unavailable} {result.problems}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(f"\n{misses} figures out of bounds; highest resident memory of this process {peak:.1f} GiB")
    return 1 if misses else 0


def cases(measured: Path | None) -> Iterator[tuple[str, str, dict[str, Any], str, dict[str, float]]]:
    """Yield name, model, spec fields, workload and recorded figures of each load."""
    if measured is not None:
        for name, (model, fields) in CASES.items():
            yield name, model, fields, "1x128+32", json.loads((measured / f"{name}.json").read_text())["metrics"]
        return
    root = Path(__file__).parents[1] / "baselines"
    for path in sorted(root.glob(f"*/{DEVICE}/*.json")):
        data = json.loads(path.read_text())
        model = path.parts[-3]
        if model not in PRESETS:
            print(f"  {model} {path.stem}: its config is in no preset (benchmarks/one_gpu.sh writes it)")
            continue
        yield f"{model} {path.stem}", model, data["spec"], data["workload"], data["memory"]


def predicted(model: str, fields: dict[str, Any], workload: str, cache_dir: Path) -> LoadResult:
    from pytest_llmload.process.job_strategies import runs_in
    from pytest_llmload.process.predicting import not_here, predict

    job = job_of(model, fields, Workload.parse(workload), cache_dir)
    if (place := runs_in(job)) != "here":
        return not_here(job, place)
    return predict(job, lambda phase: None)


def job_of(model: str, fields: dict[str, Any], workload: Workload, cache_dir: Path) -> Job:
    from pytest_llmload.worker.checkpoints.resolve import resolve

    checkpoint = resolve(f"random:{config_of(model, cache_dir)}", cache_dir, with_values=False)
    spec = LoadSpec.from_json({"model": checkpoint.path, "name": model, "workload": str(workload), **fields})
    device = predicted_device(DEVICE)
    return Job(
        spec=spec,
        device=Device(device.kind, device.key, device.gpus[: max(spec.gpu_count, spec.world_size)]),
        checkpoint=checkpoint,
        adapter=adapter_of(spec, checkpoint, cache_dir),
        predicted=True,
    )


def adapter_of(spec: LoadSpec, checkpoint: Checkpoint, cache_dir: Path) -> Adapter | None:
    from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter

    if spec.adapter is None:
        return None
    return Adapter(str(resolve_adapter(spec.adapter, checkpoint, cache_dir)), "")


def cell(metric: str, recorded: float | None, result: LoadResult) -> str:
    value = result.metrics.get(metric)
    if value is None or recorded is None:
        return "unavailable" if value is None else "not recorded"
    if value == recorded:
        return "="
    share = (value - recorded) / recorded
    text = f"{value - recorded:+,.0f} ({share:+.3%})"
    return text if abs(share) <= BOUNDS.get(metric, 0.0) else f"**{text}**"


if __name__ == "__main__":
    sys.exit(main())
