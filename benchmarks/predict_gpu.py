"""Record on a GPU what the caching allocator was asked for, event by event: a prediction is held against it.

    python benchmarks/predict_gpu.py OUT [NAME ...]

Each case loads a random checkpoint, runs the first forward and generates the workload in a process of its own, with
torch's memory history switched on. ``OUT/NAME.json`` has every allocation and release (bytes asked for, the block's
address as a number, the Python line that asked), the moments at which the phases begin, the figures of the load, and
the segments at the end. ``OUT/NAME-ops.json`` has what each ATen operator of one forward and three tokens allocates.
Without names, all cases run, ``--jobs`` at a time.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pytest_llmload.prediction.devices import PREDICTED

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "vocab_size": 65536,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "vocab_size": 30080,
    "dtype": "float16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Configs that are no preset, and so have no baseline.
SHAPES: dict[str, dict[str, Any]] = {"qwen3-2b": _QWEN3, "gemma3-1b": _GEMMA3, "neox-1b": _NEOX}

_NF4: dict[str, Any] = {"quant": "nf4"}
_INT8: dict[str, Any] = {"quant": "int8"}
_CUT = {"strategy": "max_memory", "max_memory": (("0", 1 << 30), ("cpu", 1 << 34))}
#: Name -> model and what the spec sets. Those that take longest first.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-2b-bf16": ("qwen3-2b", {}),
    "qwen3-2b-nf4": ("qwen3-2b", _NF4),
    "qwen3-2b-int8": ("qwen3-2b", _INT8),
    "gemma3-1b-bf16": ("gemma3-1b", {}),
    "gemma3-1b-nf4-dq": ("gemma3-1b", {**_NF4, "double_quant": True, "compute_dtype": "bf16"}),
    "llama-1b-bf16": ("llama-1b", {}),
    "llama-1b-nf4": ("llama-1b", _NF4),
    "llama-1b-int8": ("llama-1b", _INT8),
    "neox-1b-fp16": ("neox-1b", {}),
    "neox-1b-fp32": ("neox-1b", {"dtype": "fp32"}),
    "neox-1b-nf4": ("neox-1b", _NF4),
    "neox-1b-int8": ("neox-1b", _INT8),
    "neox-1b-max_memory": ("neox-1b", _CUT),
    "neox-1b-qlora": ("neox-1b", {**_NF4, "adapter": "random"}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=5, help="processes at a time (default: 5)")
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "predict-gpu")
    parser.add_argument(
        "--compact", type=Path, help="write what OUT has of the named cases as test data to this folder"
    )
    parser.add_argument("--one", choices=CASES, help="measure this case in this process")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.one:
        return measure_case(options.one, options.output, options.cache_dir)
    if options.compact:
        for name in options.names:
            compact(options.output / f"{name}.json", options.compact / f"{name}.json")
        return 0
    return run_cases(options)


def run_cases(options: argparse.Namespace) -> int:
    names = options.names or list(CASES)
    begin = time.monotonic()

    def child(name: str) -> tuple[str, int]:
        command = [sys.executable, __file__, str(options.output), "--cache-dir", str(options.cache_dir), "--one", name]
        environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        with (options.output / f"{name}.log").open("w") as log:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        return name, code

    failed = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for name, code in pool.map(child, names):
            print_case(options.output, name, code)
            failed += code != 0
    print(f"{len(names)} cases, {failed} failed, {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


def print_case(output: Path, name: str, code: int) -> None:
    if code:
        tail = (output / f"{name}.log").read_text().splitlines()[-12:]
        print(f"{name}: exit status {code}", *tail, sep="\n    ", flush=True)
        return
    figures = json.loads((output / f"{name}.json").read_text())["metrics"]
    print(
        f"{name:20}",
        *(f"{metric.removeprefix('gpu.')} {figures.get(metric, 0):,.0f}" for metric in PREDICTED),
        flush=True,
    )


def measure_case(name: str, output: Path, cache_dir: Path) -> int:
    import torch

    from pytest_llmload.process.measurement import measure

    job = gpu_job(name, cache_dir)
    phases: list[list[Any]] = []
    recording = {"active": False}

    def phase(which: str) -> None:
        if which == "load":
            torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=4_000_000)
            recording["active"] = True
        count = 0
        if recording["active"]:
            stats = torch.cuda.memory_stats(0)
            count = int(stats["allocation.all.allocated"])
        phases.append([which, count])

    with operators() as table:
        result, loaded = measure(dataclasses.replace(job, checks=True), phase)
        snapshot = torch.cuda.memory._snapshot(0)
        torch.cuda.memory._record_memory_history(None)
        write_trace(output / f"{name}.json", name, snapshot, phases, result)
        if loaded is not None:
            table.run(loaded)
    (output / f"{name}-ops.json").write_text(table.to_json())
    return 0


def config_of(model: str, cache_dir: Path) -> str:
    """Return what ``random:`` takes for a model of the cases: a preset, or the path of a config that is written."""
    if model not in SHAPES:
        return model
    folder = cache_dir / "configs" / model
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[model]))
    return str(folder)


def gpu_job(name: str, cache_dir: Path) -> Any:
    """Return the job of one case on the first GPU."""
    import pynvml

    from pytest_llmload.core.job import MEMORY, Adapter, Device, Gpu, Job
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.worker.checkpoints.digests import adapter_digest
    from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter
    from pytest_llmload.worker.checkpoints.resolve import resolve

    model, fields = CASES[name]
    checkpoint = resolve(f"random:{config_of(model, cache_dir)}", cache_dir)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    gpu = Gpu(
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        name=pynvml.nvmlDeviceGetName(handle),
        total=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )
    key = gpu.name.lower().replace(" ", "-")
    adapter = None
    if "adapter" in fields:
        path = resolve_adapter(fields["adapter"], checkpoint, cache_dir)
        adapter = Adapter(str(path), adapter_digest(path, cache_dir))
    return Job(
        spec=LoadSpec(model=checkpoint.path, name=model, **fields),
        device=Device("cuda", key, (gpu,)),
        checkpoint=checkpoint,
        adapter=adapter,
        figures=(MEMORY,),
    )


def write_trace(path: Path, name: str, snapshot: Any, phases: list[list[Any]], result: Any) -> None:
    """Write one case: events as ``[action, address, size, stack]`` with addresses numbered as they come."""
    addresses: dict[int, int] = {}
    stacks: dict[str, int] = {}
    events = []
    for event in snapshot["device_traces"][0]:
        address = addresses.setdefault(event.get("addr", 0), len(addresses))
        frames = [frame for frame in event.get("frames", ()) if "/torch/" not in frame["filename"]][:4]
        text = " < ".join(f"{short(frame['filename'])}:{frame['line']} {frame['name']}" for frame in frames)
        events.append([event["action"], address, event["size"], stacks.setdefault(text, len(stacks))])
    segments = [
        [segment["segment_type"], segment["total_size"], segment["allocated_size"]] for segment in snapshot["segments"]
    ]
    head = {
        "case": name,
        "spec": result.spec,
        "environment": result.environment,
        "metrics": {key: value for key, value in result.metrics.items() if key.startswith("gpu.")},
        "phase_peaks": result.phase_peaks,
        "problems": [problem.message for problem in result.problems],
        "phases": phases,
        "segments": segments,
        "stacks": list(stacks),
    }
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    path.write_text(f'{json.dumps(head)[:-1]}, "events": [\n{lines}\n]}}\n')


def compact(source: Path, target: Path) -> None:
    """Write a trace up to the end of the first forward: the bytes of each allocation; where released, minus its number.

    Allocations are numbered from 1.
    """
    data = json.loads(source.read_text())
    phases = dict(data["phases"])
    events: list[int] = []
    marks: dict[str, int] = {}
    live: dict[int, int] = {}
    count = 0
    for action, address, size, _ in data["events"]:
        if action == "alloc":
            done = phases["load"] + count
            marks |= {name: len(events) for name in ("settle", "forward", "logits") if phases[name] == done}
            if done == phases["logits"]:
                break
            live[address] = count
            events.append(size)
            count += 1
        elif action == "free_completed" and address in live:
            events.append(-1 - live.pop(address))
    figures = {name: data["metrics"][name] for name in (*PREDICTED, "gpu.forward_peak")}
    head = {"figures": figures, "reserved": {name: peaks["gpu.0"] for name, peaks in data["phase_peaks"].items()}}
    target.write_text(json.dumps({**head, "marks": marks, "events": events}, separators=(",", ":")) + "\n")


def short(file: str) -> str:
    return "/".join(Path(file).parts[-2:])


def operators() -> Any:
    """Return a context in which ``run(loaded)`` counts what each operator of a forward and a generation allocates."""
    import contextlib

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{value.device.type[:3]}"
        return repr(value)[:40]

    class Mode(TorchDispatchMode):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.rows: dict[str, collections.Counter[str]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = torch.cuda.memory_stats(0)
            out = func(*args, **(kwargs or {}))
            after = torch.cuda.memory_stats(0)
            kept = sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            names = ("allocation.all.allocated", "requested_bytes.all.allocated", "requested_bytes.all.current")
            made = [int(after[name] - before[name]) for name in names]
            if made[0]:
                key = f"{func}({', '.join(str(described(leaf)) for leaf in tree_leaves((args, kwargs)))})"
                self.rows.setdefault(key, collections.Counter())[f"{made} out {kept}"] += 1
            return out

        def run(self, loaded: Any) -> None:
            from pytest_llmload.worker.model.generation import first_forward, generate_workload

            with self:
                first_forward(loaded)
                generate_workload(loaded, new_tokens=3)

        def to_json(self) -> str:
            return json.dumps({key: dict(counts) for key, counts in self.rows.items()}, indent=0)

    return contextlib.nullcontext(Mode())


if __name__ == "__main__":
    sys.exit(main())
