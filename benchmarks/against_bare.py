"""Hold a run's allocator figures against a bare script's: they must be equal to the byte.

    python benchmarks/against_bare.py REPORT.json [VARIANT ...]

Loads the single-device variants of the report (or those named) again with ``bare_load.py``, each in a process of its
own.
"""

import json
import subprocess
import sys
from pathlib import Path

from pytest_llmload.host.settings.settings import default_cache
from pytest_llmload.worker.checkpoints.resolve import resolve

EXACT = ("gpu.settled", "gpu.load_peak", "gpu.load_allocated", "gpu.load_allocations", "gpu.generate_peak")


def main(report: str, variants: list[str]) -> int:
    different = 0
    for run in json.loads(Path(report).read_text())["runs"]:
        spec = run["spec"]
        if spec["strategy"] != "single" or run["load"] != "loaded" or (variants and run["variant"] not in variants):
            continue
        path = resolve(spec["model"], default_cache()).path
        options = {name: spec[name] for name in ("dtype", "quant", "double_quant", "workload")}
        command = [sys.executable, str(Path(__file__).with_name("bare_load.py")), path, json.dumps(options)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        bare = json.loads(output.splitlines()[-1])
        for name in EXACT:
            ours = run["metrics"][name]
            verdict = "equal" if ours == bare[name] else f"DIFFERENT by {ours - bare[name]:+,.0f}"
            different += ours != bare[name]
            print(f"{run['variant']:12} {name:22} plugin {ours:>18,.0f}  bare {bare[name]:>18,.0f}  {verdict}")
        ratio = run["metrics"]["load"] / bare["load"]
        print(f"{run['variant']:12} load                   plugin / bare = {ratio:.2f} (one load each)")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
