"""Every architecture that the installed transformers maps, tiny and random, through every strategy: a public table.

    python benchmarks/architectures.py                      # what is not measured yet; writes as it goes
    python benchmarks/architectures.py --types llama,bert   # these, anew
    python benchmarks/architectures.py --faults 24          # plant three faults on so many types of all families,
                                                            # those of before included
    python benchmarks/architectures.py --device cuda        # on this machine's GPU; under bf16, nf4 and int8
    python benchmarks/architectures.py --table              # only write docs/architectures.md from what is measured

``--jobs N`` measures so many types at once. One process a type and step, each with a time-out. A bare script,
``bare_architecture.py``, checks first that the library can build, save, load, run and generate it. Each strategy is
then recorded and gated as the plugin does it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import gc
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bare_architecture
import tiny_configs

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = Path(__file__).parent / "samples"
#: Device -> the rows that were measured on it.
RESULTS = {"cpu": SAMPLES / "architectures.jsonl", "cuda": SAMPLES / "architectures_gpu.jsonl"}
#: What was said of each planted fault.
FAULTS = SAMPLES / "architectures_faults.jsonl"
TABLE = ROOT / "docs" / "architectures.md"
STRATEGIES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "nf4": {"quant": "nf4"},
    "int8": {"quant": "int8"},
    "lora": {"adapter": "random"},
    "offload": {"strategy": "offload"},
}
#: On a GPU: where bitsandbytes has kernels of its own.
ON_GPU = ("bf16", "nf4", "int8")
SECONDS = 120.0


# --- one type, in processes of its own -------------------------------------------------------------------------------


def in_child(function: Callable[..., Any], *args: Any, seconds: float = SECONDS) -> Any:
    """Return what a function returns in a forked process; a text that says how it ended otherwise."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return f"no answer after {seconds:.0f} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"the process died (exit status {process.exitcode})"
    finally:
        process.kill()
        process.join()


def _child(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        sender.send(function(*args))
    except Exception as error:  # noqa: BLE001 - how it ended is the answer
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        sender.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where})")


def bare(model_type: str, family: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return bare_architecture.attempt(model_type, family, Path(folder))


def checkpoint(model_type: str, family: str, cache: Path) -> Any:
    """Return the files of the type's random checkpoint."""
    from pytest_llmload.worker.checkpoints.resolve import resolve

    folder = cache / "configs" / model_type
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tiny_configs.tiny(model_type, family), indent=1, default=str)
    (folder / "config.json").write_text(text)
    return resolve(f"random:{folder}", cache)


@functools.cache
def device(kind: str) -> Any:
    """Return the device as a run finds it, from a process of its own: the driver's library must not be forked."""
    from pytest_llmload.host.loads import hardware

    return in_child(hardware.detect, kind)


def job(files: Any, cache: Path, kind: str, fields: dict[str, Any]) -> Any:
    """Return the job of a load; a random adapter is written here, not in the process whose memory is measured."""
    from pytest_llmload.core.job import MEMORY, Adapter, Job
    from pytest_llmload.core.spec import LoadSpec, Workload
    from pytest_llmload.worker.checkpoints.digests import adapter_digest
    from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter

    spec = LoadSpec(model=files.path, name=Path(files.path).name, workload=Workload(1, 16, 4), **fields)
    adapter = None
    if spec.adapter is not None:
        path = resolve_adapter(spec.adapter, files, cache)
        adapter = Adapter(str(path), adapter_digest(path, cache))
    return Job(spec=spec, device=device(kind), checkpoint=files, adapter=adapter, figures=(MEMORY,))


def load(asked: Any, fault: str = "") -> Any:
    """Return the result of one load as plain data, with a fault planted or not."""
    from pytest_llmload.process.measurement import measure

    if fault:
        import planted_architecture

        planted_architecture.plant(fault)
    result, _ = measure(asked, lambda phase: None)
    return result.to_json()


def strategy(model_type: str, family: str, cache: Path, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Record one strategy and gate it; return what a user would be told."""
    from pytest_llmload.baselines import codec
    from pytest_llmload.baselines.compare import compare
    from pytest_llmload.baselines.record import record
    from pytest_llmload.core.results import LoadResult

    files = in_child(checkpoint, model_type, family, cache)
    if isinstance(files, str):
        return {"verdict": "not built", "because": files}
    asked = in_child(job, files, cache, kind, fields)
    if isinstance(asked, str):
        return {"verdict": "refused", "because": asked}
    results = []
    for _ in range(2):
        answer = in_child(load, asked)
        if isinstance(answer, str):
            return {"verdict": "raised", "because": answer}
        results.append(LoadResult.from_json(answer))
        if results[-1].faults:
            return {"verdict": "fault of ours", "because": results[-1].faults[0].message}
        if not results[-1].ok:
            problems = [[item.check, item.message, list(item.names[:4])] for item in results[-1].problems]
            return {"verdict": "not applied", "problems": problems, "notes": results[-1].notes}
    recording = record(None, results[:1], update=True)
    if recording.baseline is None:
        return {"verdict": "not recorded", "because": "; ".join(recording.refusals)}
    baseline = codec.loads(codec.dumps(recording.baseline), "sweep")
    comparison = compare(baseline, results[1], section="memory")
    moved = [f"{item.name} {item.verdict}: {item.reason}" for item in comparison.metrics if item.verdict != "ok"]
    moved = [text for text in moved if "unavailable" not in text]
    told = [*moved, *(change.text for change in comparison.manifest)]
    word = "right" if comparison.verdict in ("ok", "improved", "unavailable") else "moved"
    return {"verdict": word, "because": "; ".join(told)[:400], "notes": results[1].notes}


def one(model_type: str, family: str, cache: Path, kind: str) -> dict[str, Any]:
    """Return everything about one type on one kind of device."""
    begin = time.perf_counter()
    row: dict[str, Any] = {"type": model_type, "family": family, "bare": in_child(bare, model_type, family)}
    if isinstance(row["bare"], str):
        row["bare"] = {"steps": [], "error": row["bare"]}
    if "forward" in row["bare"]["steps"]:
        row["strategies"] = {
            name: strategy(model_type, family, cache, kind, fields)
            for name, fields in STRATEGIES.items()
            if kind == "cpu" or name in ON_GPU
        }
    return {**row, "seconds": round(time.perf_counter() - begin, 1), "versions": versions(kind)}


def versions(kind: str) -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("transformers", "torch", "bitsandbytes", "peft", "accelerate")}
    return found if kind == "cpu" else {"GPU": device(kind).gpus[0].name, **found}


# --- planted faults --------------------------------------------------------------------------------------------------


def faults(rows: dict[str, Any], done: list[dict[str, Any]], count: int, cache: Path) -> Iterator[dict[str, Any]]:
    """Plant each fault on types of all families whose clean loads are right, and yield what was said of it.

    A family has types for which an earlier one stands in the table; ``done`` are rows of before, which count.
    """
    import planted_architecture

    known = {row["type"]: row["family"] for row in done}
    for family in tiny_configs.FAMILIES:
        left = -(-count // len(tiny_configs.FAMILIES)) - list(known.values()).count(family)
        for model_type in tiny_configs.mapped(family):
            if left <= 0:
                break
            if model_type in known or not _is_right(rows.get(model_type, {}), family):
                continue
            clean = [
                strategy(model_type, family, cache, "cpu", fields) for fields in ({"dtype": "fp32"}, {"quant": "nf4"})
            ]
            if any(found["verdict"] != "right" for found in clean):
                continue
            known[model_type], left = family, left - 1
            files = in_child(checkpoint, model_type, family, cache)
            for fault, fields in planted_architecture.FAULTS.items():
                answer = in_child(load, in_child(job, files, cache, "cpu", fields), fault)
                told: dict[str, Any] = {"type": model_type, "family": family, "fault": fault}
                # A load that ended by itself caught nothing.
                ended = isinstance(answer, str)
                yield told | (
                    {"said": "", "error": answer} if ended else {"said": planted_architecture.said(fault, answer)}
                )


def _is_measured(row: dict[str, Any]) -> bool:
    """Return true if each strategy was measured, or the bare script does not get as far as a forward."""
    return "strategies" in row or bool(row and "forward" not in row["bare"]["steps"])


def _is_right(row: dict[str, Any], family: str) -> bool:
    """Return false if a type's row of this family says that a clean load is not right."""
    found = row.get("strategies", {})
    return row.get("family") != family or all(found.get(name, {}).get("verdict") == "right" for name in ("fp32", "nf4"))


# --- the table -------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """Return the last row of each type."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines() if line)
    return {row["type"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="", help="model types, joined by commas; measured anew")
    parser.add_argument("--device", choices=tuple(RESULTS), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--results", type=Path, help="file of the measured rows instead of the one in samples/")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "llmload-architectures")
    parser.add_argument("--faults", type=int, default=0, metavar="N")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = options.results or RESULTS[options.device]
    rows = read(results)
    if options.faults:
        _preload("cpu")
        done = [json.loads(line) for line in FAULTS.read_text().splitlines()]
        with FAULTS.open("a") as file:
            for row in faults(rows, done, options.faults, options.cache):
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(*row.values(), flush=True)
    elif not options.table:
        _preload(options.device)
        left = [name for name in tiny_configs.types() if not _is_measured(rows.get(name, {}))]
        wanted = options.types.split(",") if options.types else left
        sweep(wanted, options.device, options.jobs, options.cache, results)
    import architectures_table

    on_gpu = read(RESULTS["cuda"])
    planted = [json.loads(line) for line in FAULTS.read_text().splitlines()]
    page = architectures_table.page(read(RESULTS["cpu"]).values(), on_gpu, len(tiny_configs.types()), planted)
    TABLE.write_text(page, encoding="utf-8")


def sweep(wanted: list[str], kind: str, jobs: int, cache: Path, results: Path) -> None:
    """Measure types, some at a time, and add a row of each to a file as soon as it is there."""
    families = tiny_configs.types()
    results.parent.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    with results.open("a") as file, concurrent.futures.ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        running = [pool.submit(one, model_type, families[model_type], cache, kind) for model_type in wanted]
        for future in concurrent.futures.as_completed(running):
            row = future.result()
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row["type"], *_summary(row), flush=True)


def _summary(row: dict[str, Any]) -> Iterator[str]:
    if row["bare"]["error"]:
        yield f"bare: {row['bare']['error']}"
    for name, found in row.get("strategies", {}).items():
        yield f"{name}={found['verdict']}"


def _preload(kind: str) -> None:
    """Import in this process what every forked one needs, without initialising CUDA."""
    # A pool of threads does not survive a fork, and tiny matrices gain nothing from one.
    os.environ["OMP_NUM_THREADS"] = "1"
    if isinstance(device(kind), str):
        raise SystemExit(device(kind))
    from pytest_llmload.process.server_imports import import_all

    gpus = device(kind).gpus
    modules = ("torch", "transformers.generation", "bitsandbytes", "peft", "pytest_llmload.process.measurement")
    import_all(
        (*modules, "pytest_llmload.process.measuring_modules"),
        {"count": len(gpus), "capability": gpus[0].capability if gpus else (0, 0)},
    )
    # What exists is not looked at again by each load's collections.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
