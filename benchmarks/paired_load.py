"""Does measuring change the load? Load time through the plugin against a bare script's, paired and in turn.

    python benchmarks/paired_load.py --model random:llama-1b --pairs 20

Each pair is three fresh processes, in an order that is turned from pair to pair: one of the plugin's that only loads
(what ``latency_baseline`` judges), one that measures everything (what ``latency_budget`` and the report show), and a
bare script. All clocks start when everything that the load needs has been imported, the device's context exists and the
garbage collector has been told to leave alone what is there (a full collection takes as long as a small load), and stop
when the device has finished. Prints the median of the paired ratios, with a 95 % interval by bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from workers import Workers

from pytest_llmload.core.job import EVERYTHING, LOADING
from pytest_llmload.core.libraries import LIBRARY, PLACEMENT
from pytest_llmload.host.settings.settings import default_cache
from pytest_llmload.worker.checkpoints.digests import read_config

BARE = """
import gc, importlib.util, json, sys, time
path, device, kind, *modules = sys.argv[1:]
for name in modules:
    importlib.import_module(name)
import torch, transformers
if importlib.util.find_spec("transformers.conversion_mapping"):
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
wait = torch.cuda.synchronize if device == "cuda" else lambda: None
torch.empty(1, device=device)
wait()
gc.collect()
gc.freeze()
before = set(sys.modules)
begin = time.perf_counter()
model = getattr(transformers, kind).from_pretrained(path, dtype="auto", device_map={"": device})
wait()
print(json.dumps({"seconds": time.perf_counter() - begin, "late": sorted(set(sys.modules) - before)}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:moe-128m")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--cache-dir", type=Path, default=default_cache())
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="paired-load-") as folder,
        Workers(Path(folder), options.model, device=options.device, cache_dir=options.cache_dir) as workers,
    ):
        job = workers.job
        kind = read_config(Path(job.checkpoint.path))["architectures"][0]
        modules = [*LIBRARY, *PLACEMENT, *workers.architecture]

        def bare() -> float:
            command = [sys.executable, "-c", BARE, job.checkpoint.path, job.device.kind, kind, *modules]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            # What the first run imported while its clock ran, the next ones import before.
            modules.extend(told["late"])
            return float(told["seconds"])

        ways: dict[str, Callable[[], float]] = {
            "bare": bare,
            "only loading": lambda: workers.measure(LOADING).metrics["load"],
            "measuring everything": lambda: workers.measure(EVERYTHING).metrics["load"],
        }
        for way in ways.values():
            way()  # The one that comes first finds the machine's caches cold.
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.pairs):
            names = [*ways]
            for name in names[number % 3 :] + names[: number % 3]:
                seconds[name].append(ways[name]())
            print("  ".join(f"{name} {taken[-1] * 1e3:.1f} ms" for name, taken in seconds.items()), flush=True)
    for name, taken in seconds.items():
        if name != "bare":
            ratios = [ours / theirs for ours, theirs in zip(taken, seconds["bare"], strict=True)]
            low, high = interval(ratios)
            middle = statistics.median(ratios)
            print(f"{name} / bare script = {middle:.3f} (95 %: {low:.3f} to {high:.3f}; {len(ratios)} pairs)")
    return 0


def interval(ratios: list[float], draws: int = 5000) -> tuple[float, float]:
    """Percentile bootstrap of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return medians[int(draws * 0.025)], medians[int(draws * 0.975)]


if __name__ == "__main__":
    sys.exit(main())
