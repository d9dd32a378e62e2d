"""False alarms of clean loads: each of N fresh processes of an unchanged load, gated against every other.

    python benchmarks/clean_gates.py                            (100 loads of each of four strategies)
    python benchmarks/clean_gates.py --loads 25 --only nf4

Prints, for each strategy, the distribution of every figure of the memory section over the loads, and how many of the
N x (N - 1) gates (each load as the baseline of each other load) are not ``ok``: ``regressed`` and ``changed`` are red,
``improved`` is red under ``--llm-strict``. With ``--work`` the counted work is gated too, from processes of its own.
Times are judged over several processes; ``latency_power.py`` counts their false alarms.

Then some loads have a transient of 10 MiB above their highest moment, and are gated against each clean load: each of
these gates must be red in ``host.peak``. Exits with 1 if a clean gate alarms, or if one of a planted load does not.

Loads are forked from a warm server, as in a run of pytest; a new server is started every ``--per-server`` loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.core.job import COUNTING, EVERYTHING, MEMORY, Adapter, Checkpoint, Device, Job, Scope
from pytest_llmload.core.metrics import find
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.core.units import format_value
from pytest_llmload.core.verdicts import OK, REGRESSED, UNAVAILABLE
from pytest_llmload.host.loads.preloaded_modules import BASE, architecture
from pytest_llmload.host.loads.processes import LoadProcess, fork
from pytest_llmload.host.loads.warm_server import WarmServer, variables
from pytest_llmload.host.settings.settings import default_cache
from pytest_llmload.worker.checkpoints.digests import adapter_digest
from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter
from pytest_llmload.worker.checkpoints.resolve import resolve

STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"quant": "int8"},
    "nf4": {"quant": "nf4"},
    "lora": {"adapter": "random"},
}
TIMEOUT = 600.0
TRANSIENT = 10 << 20
PLANTED = Path(__file__).parent / "planted"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=100, help="fresh processes of each strategy")
    parser.add_argument("--only", choices=STRATEGIES, action="append", help="one strategy; may be repeated")
    parser.add_argument("--model", default="tiny-llama", help="a preset of random weights")
    parser.add_argument("--workload", default="1x128+32")
    parser.add_argument("--per-server", type=int, default=10, help="loads that are forked from one warm server")
    parser.add_argument("--work", action="store_true", help="gate the counted work too")
    parser.add_argument("--transients", type=int, default=5, help="loads of each strategy with a planted transient")
    options = parser.parse_args()
    checkpoint = resolve(f"random:{options.model}", default_cache())
    sections = {"memory": EVERYTHING, **({"work": COUNTING} if options.work else {})}
    total, missed = Counter[str](), 0
    for strategy, section in itertools.product(options.only or STRATEGIES, sections):
        scope = sections[section]
        job = job_of(strategy, checkpoint, Workload.parse(options.workload), scope)
        loads = list(itertools.islice(fresh_loads(job, options.per_server), options.loads))
        alarms, gates = gated(loads, section)
        total.update(alarms)
        print(f"\n{options.model} {strategy}, {section}: {len(loads)} loads, {gates} gates")
        table(loads, section, alarms)
        if section == "memory" and options.transients:
            planted = list(itertools.islice(loads_with_a_transient(job, loads[0]), options.transients))
            missed += not_red(loads, planted)
    print(f"\nalarms: {sum(total.values())}", *(f"{name} {count}" for name, count in total.most_common()))
    print(f"gates of a load with a transient that are not red: {missed}")
    return 1 if total or missed else 0


def job_of(strategy: str, checkpoint: Checkpoint, workload: Workload, scope: Scope) -> Job:
    """Return the job of one strategy on the CPU, as a run of pytest makes it."""
    spec = LoadSpec(model=checkpoint.path, name=Path(checkpoint.path).name, workload=workload, **STRATEGIES[strategy])
    adapter = None
    if spec.adapter is not None:
        path = resolve_adapter(spec.adapter, checkpoint, default_cache())
        adapter = Adapter(str(path), adapter_digest(path, default_cache()))
    figures = (MEMORY,) if scope is EVERYTHING else scope.figures
    return Job(
        spec=spec, device=Device("cpu", "cpu"), checkpoint=checkpoint, adapter=adapter, figures=figures,
        checks=scope.checks, cwd=str(Path.cwd()),
    )  # fmt: skip


def fresh_loads(job: Job, per_server: int, environ: Mapping[str, str] = os.environ) -> Iterator[LoadResult]:
    """Yield the results of loads in fresh processes without end."""
    with tempfile.TemporaryDirectory() as folder:
        while True:
            server = WarmServer(Path(folder) / "server.log", variables(environ))
            try:
                server.warm_up([*BASE, "peft", "bitsandbytes", *architecture(job.checkpoint.model_type)], None)
                for number in range(per_server):
                    process = fork(server, Path(folder) / f"{number}.log")
                    assert isinstance(process, LoadProcess), process
                    reply = process.request({"kind": "load", "job": job.to_json()}, TIMEOUT)
                    process.close()
                    assert reply["kind"] == "result", reply
                    yield LoadResult.from_json(reply["result"])
            finally:
                server.close()


def loads_with_a_transient(job: Job, clean: LoadResult) -> Iterator[LoadResult]:
    """Yield the results of loads whose first forward has a transient of 10 MiB above the load's highest moment."""
    # The highest moment of a clean load may be in a different phase.
    below = int(clean.metrics["host.peak"] - clean.phase_peaks["forward"]["host"])
    planted = dataclasses.replace(job, imports=("transient",), sys_path=(str(PLANTED),))
    environ = {**os.environ, "LLMLOAD_PLANTED_BYTES": str(below + TRANSIENT)}
    return fresh_loads(planted, 10, environ)


def not_red(clean: list[LoadResult], planted: list[LoadResult]) -> int:
    """Print the peaks of planted loads; return how many gates against clean loads are not red in ``host.peak``."""
    green = 0
    for load, recorded in itertools.product(planted, map(_baseline, clean)):
        (peak,) = (item for item in compare(recorded, load).metrics if item.name == "host.peak")
        green += peak.verdict != REGRESSED
    peaks = ", ".join(format_value(load.metrics["host.peak"], "B") for load in planted)
    print(f"  with a transient of 10 MiB: host.peak {peaks}; {green} of {len(planted) * len(clean)} gates are not red")
    return green


def gated(loads: list[LoadResult], section: str) -> tuple[Counter[str], int]:
    """Return how many gates of each metric are not ok, and the number of gates."""
    alarms = Counter[str]()
    pairs = list(itertools.permutations(range(len(loads)), 2))
    baselines = [_baseline(load) for load in loads]
    for recorded, current in pairs:
        for item in compare(baselines[recorded], loads[current], section=section).metrics:
            if item.verdict not in (OK, UNAVAILABLE) and not item.informative:
                alarms[item.name] += 1
    return alarms, len(pairs)


def _baseline(load: LoadResult) -> Baseline:
    baseline = record(None, [load], update=True, sections=("memory", "work")).baseline
    assert baseline is not None
    return baseline


def table(loads: list[LoadResult], section: str, alarms: Counter[str]) -> None:
    """Print the distribution of every figure, its tolerance, and its alarms."""
    for name in sorted({name for load in loads for name in load.metrics} | set(alarms)):
        metric = find(name)
        if metric is None or metric.section != section:
            # The manifest and the numbers have no one value.
            if name in alarms:
                print(f"  {name:22} {alarms[name]:6} alarms")
            continue
        values = sorted(load.metrics[name] for load in loads if name in load.metrics)
        points = (values[0], statistics.median(values), values[-1])
        low, middle, high = (format_value(value, metric.unit) for value in points)
        spread = f"{low} .. {middle} .. {high}" if values[0] != values[-1] else f"always {low}"
        judged = (
            "informative" if metric.informative else f"{alarms[name]} alarms ({metric.tolerance.format(metric.unit)})"
        )
        print(f"  {name:22} {spread:42} {judged}")


if __name__ == "__main__":
    sys.exit(main())
