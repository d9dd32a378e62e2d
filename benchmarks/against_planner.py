"""Hold the planner's figures against what a run measured: settled memory within 1 %.

python benchmarks/against_planner.py REPORT.json
"""

import json
import sys
import time
from pathlib import Path

from pytest_llmload.core.job import Device, Job
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.settings.settings import default_cache
from pytest_llmload.process.job_strategies import plan
from pytest_llmload.strategies.builtin import BUILTIN
from pytest_llmload.worker.checkpoints.resolve import resolve


def main(report: str) -> int:
    wrong = 0
    gpus, driver = hardware.visible_gpus()
    for run in json.loads(Path(report).read_text())["runs"]:
        spec = LoadSpec.from_json(run["spec"])
        if run["load"] != "loaded" or BUILTIN[spec.strategy].placement is None:
            continue
        device = Device("cuda", "", gpus[: spec.gpu_count], driver) if gpus else hardware.detect("cpu")
        start = time.perf_counter()
        planned = plan(Job(spec=spec, device=device, checkpoint=resolve(spec.model, default_cache())))
        seconds = time.perf_counter() - start
        for figure in sorted(name for name in planned if name.endswith(".settled" if gpus else "host.weights")):
            measured = run["metrics"].get(figure, 0)
            off = planned[figure] / measured - 1 if measured else 0.0
            wrong += abs(off) > 0.01
            print(
                f"{run['variant']:12} {figure:14} planned {planned[figure]:>18,.0f}  measured {measured:>18,.0f}  "
                f"{off:+.3%}  in {seconds:.1f} s"
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
