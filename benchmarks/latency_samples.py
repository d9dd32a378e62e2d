"""Times and work of one model in many fresh processes with nothing changed between them, as JSON.

What a gate for latency has to live with on a machine: ``latency_power.py`` studies what it says on these samples.
Each process is forked from a warm server, loads, generates and is gone, through the same code as a test's load.

    python benchmarks/latency_samples.py out.json --model random:llama-1b --processes 20
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workers import Workers

from pytest_llmload.core.job import COUNTING, LOADING, TIMES, Scope
from pytest_llmload.core.metrics import METRICS, MODEL_TIMES
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.settings.settings import default_cache

KEPT = ("accelerate", "cpu", "cuda", "driver", "gpu", "host", "loader_threads", "python", "torch", "transformers")


def main() -> int:
    options = _arguments()
    begin = time.monotonic()
    results: list[LoadResult] = []
    counts: dict[Scope, int] = {LOADING: options.loads, TIMES: options.processes, COUNTING: options.work}
    with (
        tempfile.TemporaryDirectory(prefix="latency-samples-") as folder,
        Workers(
            Path(folder),
            options.model,
            device=options.device,
            workload=options.workload,
            page_cache=options.page_cache,
            imports=tuple(options.imports),
            cache_dir=options.cache_dir,
        ) as workers,
    ):
        for index, scope in enumerate(_in_turn(counts)):
            if options.limit and time.monotonic() - begin > options.limit:
                print(f"stopped after {index} processes: {options.limit:g} s are over", flush=True)
                break
            results.append(workers.measure(scope))
            print(_line(index, results[-1], time.monotonic() - begin), flush=True)
        spec = workers.job.spec
    _write(options, spec, results)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="random:llama-1b")
    parser.add_argument("--workload", default="1x128+32", help="BATCHxPROMPT+NEW (default: 1x128+32)")
    parser.add_argument("--processes", type=int, default=20, help="that load and generate (default: 20)")
    parser.add_argument("--loads", type=int, default=60, help="further processes that only load (default: 60)")
    parser.add_argument("--work", type=int, default=6, help="further processes that count the work (default: 6)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--imports", nargs="*", default=[], help="modules that each process imports before it loads")
    parser.add_argument("--page-cache", default="warm", choices=("warm", "cold", "uncontrolled"))
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which no further process starts")
    parser.add_argument("--cache-dir", type=Path, default=default_cache())
    return parser.parse_args()


def _in_turn(counts: dict[Scope, int]) -> list[Scope]:
    """Each scope as often as asked, evenly mixed: a host that changes meanwhile changes for all."""
    places = [((place + 0.5) / count, scope) for scope, count in counts.items() for place in range(count)]
    return [scope for _, scope in sorted(places, key=lambda item: item[0])]


def _line(index: int, result: LoadResult, seconds: float) -> str:
    taken = [name for name in MODEL_TIMES if name in result.metrics]
    times = "  ".join(f"{name} {result.metrics[name] * 1e3:8.2f} ms" for name in taken)
    work = {name: value for name, value in result.metrics.items() if METRICS[name].section == "work"}
    return f"{seconds:6.1f} s  {index:3d}  {times}  {result.environment['page_cache']}  {work or ''}"


def _write(options: argparse.Namespace, spec: LoadSpec, results: list[LoadResult]) -> None:
    first = results[0].environment
    head: dict[str, Any] = {
        "model": options.model,
        "workload": str(spec.workload),
        "cores": len(os.sched_getaffinity(0)),
        "environment": {name: first[name] for name in KEPT if first.get(name)},
    }
    rows = [_process(result) for result in results]
    lines = ",\n".join(f"  {json.dumps(row, separators=(',', ':'))}" for row in rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(f'{json.dumps(head)[:-1]}, "processes": [\n{lines}\n]}}\n', encoding="utf-8")


def _process(result: LoadResult) -> dict[str, Any]:
    # Of a process that counts the work, nothing was timed in turn with a control.
    timed = result.samples if "load.relative" in result.samples else {}
    samples = {name: [float(f"{value:.5g}") for value in values] for name, values in timed.items()}
    work = {name: value for name, value in result.metrics.items() if METRICS[name].section == "work"}
    return {"page_cache": result.environment["page_cache"], "samples": samples, **({"work": work} if work else {})}


if __name__ == "__main__":
    sys.exit(main())
