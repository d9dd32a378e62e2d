"""Reports with every kind of verdict, made of sample loads: for the tests of the formats, and to look at."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from sample_loads import ENVIRONMENT, GIB, METRICS, MIB, NF4, load, manifest

from pytest_llmload.baselines.codec import timing_entry
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.baselines.timings import timings
from pytest_llmload.core.metrics import MODEL_TIMES, PEAK_PHASES, Metric
from pytest_llmload.core.results import NOT_APPLIED, OUT_OF_MEMORY, ErrorInfo, LoadResult, Problem
from pytest_llmload.core.runs import Run
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.core.units import Tolerance
from pytest_llmload.core.verdicts import ERROR, FAIL, SKIP
from pytest_llmload.reports.document import document

DEVICE = "nvidia-h100-80gb-hbm3"
FAILING = ("regressed", "changed", "missing", "incomparable")
#: Text that would be markup, a mention, a link or a command in one format or another.
HOSTILE = "<img src=x onerror=alert(1)></td></script><script>alert(2)</script>\"'&|`@all ](http://x) ::error::x\r\n%0A"


def _timeline(peak: float, seconds: float) -> dict[str, list[list[float]]]:
    """A load that fills a GPU in steps, as a sampler sees it."""
    steps = [(index / 99, index // 5 / 19) for index in range(100)]
    gpu = [[seconds * t, min(peak, 0.05 * peak + 0.9 * peak * y + (0.05 * peak if i % 5 == 2 else 0))]
           for i, (t, y) in enumerate(steps)]  # fmt: skip
    host = [[seconds * t, 200 * MIB + 700 * MIB * math.sin(math.pi * t)] for t, _ in steps]
    return {"gpu.0": gpu, "host": host}


def measured(spec: LoadSpec, scale: float = 1.0, **changes: Any) -> LoadResult:
    """A load of ``spec`` whose memory is the sample's times ``scale``."""
    metrics: dict[str, float] = {
        name: round(value * scale) for name, value in METRICS.items() if name.startswith(("gpu.", "weights"))
    }
    metrics |= {"gpu.context": METRICS["gpu.context"], "gpu.load_allocations": METRICS["gpu.load_allocations"]}
    metrics |= {"prefill.kernels": 1200, "prefill.syncs": 3, "token.kernels": 980, "token.gpu_time": 0.0121}
    rng = random.Random(spec.slug)
    samples = {name: [rng.gauss(METRICS[name], METRICS[name] * 0.02) for _ in range(20)] for name in MODEL_TIMES}
    ledger = {
        "weights": metrics["gpu.weights"],
        "rest": metrics["gpu.generate_peak"] - metrics["gpu.weights"],
        "reserved": metrics["gpu.reserved_peak"] - metrics["gpu.generate_peak"],
        "context": 500 * MIB,
        "other": 40 * MIB,
        "process": metrics["gpu.reserved_peak"] + 540 * MIB,
    }
    values = {
        "samples": samples,
        "ledger": [ledger],
        "phases": {
            "import": 3.2,
            "context": 0.4,
            "load": 12.31,
            "load.read": 4.1,
            "load.convert": 6.0,
            "load.move": 1.2,
            "load.other": 1.01,
            "forward": 0.2,
            "generate": 0.9,
        },
        "phase_peaks": {
            phase: {"gpu.0": metrics[f"gpu.{phase}_peak"], "host": (900 - 250 * place) * MIB}
            for place, phase in enumerate(PEAK_PHASES)
        },
        "timeline": _timeline(metrics["gpu.load_peak"], 12.31),
        **changes,
    }
    return load(spec, metrics={**metrics, **values.pop("metrics", {})}, **values)


def judged(spec: LoadSpec, baseline: Baseline | None, result: LoadResult, **fields: Any) -> Run:
    """A load that was compared with a baseline as both fixtures do it."""
    comparisons = [compare(baseline, result, section=section) for section in ("memory", "work", "time")]
    run = Run(spec, DEVICE, result, comparisons, [f"tests/test_loads.py::test_memory[{spec.id}]"])
    run.outcome = FAIL if run.verdict in FAILING else "pass"
    run.baseline = f"baselines/{spec.name}/{DEVICE}/{spec.slug}.json"
    run.command = f"pytest 'tests/test_loads.py::test_memory[{spec.id}]' --llm-update-baselines"
    run.locations = {run.nodeids[0]: "tests/test_loads.py:14"}
    run.times = {name: timing_entry(timing) for name, timing in timings([result]).items()}
    return dataclasses.replace(run, **fields)


def runs(hostile: str = "") -> list[Run]:
    """One load of each fate; ``hostile`` stands wherever a user, a library or a model can put a text."""
    polyglot = LoadSpec(model="random:polyglot-ko-12.8b", name="polyglot-ko-12.8b")
    fields_of: dict[str, dict[str, Any]] = {
        "none": {},
        "fp16": {"dtype": "fp16"},
        "int8": {"quant": "int8"},
        "nf4": {"quant": "nf4"},
        "offload": {"strategy": "offload"},
        "lora": {"quant": "nf4", "adapter": "random"},
    }
    variants = {name: dataclasses.replace(polyglot, **fields) for name, fields in fields_of.items()}
    scales = {"none": 3.4, "fp16": 3.4, "int8": 1.9, "nf4": 1.05, "offload": 1.7, "lora": 1.1}
    found = []
    for name, spec in variants.items():
        result = measured(spec, scales[name])
        kept = record(None, [result, result], update=True).baseline
        if name == "int8":
            result = measured(spec, scales[name], metrics={"gpu.generate_peak": METRICS["gpu.generate_peak"]})
        found.append(judged(spec, kept, result))
    # The story: double quantisation was dropped.
    old = measured(NF4)
    now = measured(
        NF4,
        metrics={"gpu.settled": round(7.17 * GIB), "gpu.0.settled": round(7.17 * GIB), "gpu.load_peak": 10 * GIB},
        manifest=manifest("nf4 absmax=float32 block=64 compute=bf16", 43 * MIB),
        environment={**ENVIRONMENT, "bitsandbytes": "0.50.2"},
        declared=(Metric("power.joules", "J", "work", Tolerance(relative=0.05), hostile or "Energy"),),
        notes=[hostile] if hostile else ["rotary_emb keeps fp32"],
    )
    found.append(judged(NF4, record(None, [old, old], update=True).baseline, now))
    found.append(judged(dataclasses.replace(NF4, quant="fp4"), None, measured(dataclasses.replace(NF4, quant="fp4"))))
    broken = dataclasses.replace(NF4, compute_dtype="bf16")
    problem = Problem(
        "quantised", f"160 weights are dense, 24.1 GiB {hostile}", ("gpt_neox.layers.0.mlp",), 0, "dense_ok"
    )
    found.append(Run(broken, DEVICE, LoadResult(broken.to_json(), NOT_APPLIED, problems=[problem]), nodeids=["t::a"]))
    large = dataclasses.replace(polyglot, dtype="fp32")
    error = ErrorInfo("CUDA out of memory", "torch.OutOfMemoryError", f"Traceback\n  {hostile}", "last line", "load")
    found.append(Run(large, DEVICE, LoadResult(large.to_json(), OUT_OF_MEMORY, error), nodeids=["t::b"]))
    for run in found[-2:]:
        run.outcome = FAIL
    held = dataclasses.replace(polyglot, attn="eager")
    found.append(Run(held, DEVICE, None, [], ["t::c"], ERROR, [f"GPU 0 is held by pid 4711 (python) {hostile}"]))
    two = dataclasses.replace(polyglot, strategy="tensor_parallel", world_size=2, gpu_count=2)
    found.append(Run(two, DEVICE, None, [], ["t::d"], SKIP, ["needs 2 GPUs, this run sees 1"]))
    if hostile:
        found = [dataclasses.replace(run, spec=dataclasses.replace(run.spec, name=hostile)) for run in found]
        for run in found:
            run.messages.append(hostile)
            run.command = hostile
            run.nodeids.append(hostile)
    return found


def report(hostile: str = "") -> dict[str, Any]:
    """The report document of :func:`runs`."""
    notes = [hostile] if hostile else ["loads started without the warm server: 2 threads"]
    return document(runs(hostile), stale=[hostile or "baselines/polyglot-ko-12.8b/old.json"], notes=notes)


def many(count: int) -> dict[str, Any]:
    """A report of ``count`` loads, every tenth of which regressed."""
    good = measured(NF4)
    kept = record(None, [good, good], update=True).baseline
    fates = judged(NF4, kept, measured(NF4, 1.1)), judged(NF4, kept, good)
    return document(
        [
            dataclasses.replace(fates[bool(number % 10)], spec=dataclasses.replace(NF4, name=f"model-{number}"))
            for number in range(count)
        ]
    )
