"""Measure what the plugin itself costs, as ratios against bare scripts in the same run.

    python benchmarks/overhead.py                              (make bench: two models, on the CPU)
    python benchmarks/overhead.py --model llama-1b --device cuda --pairs 5
    python benchmarks/overhead.py --only gate --model llama-7b --device cuda

Prints the time to start an isolated load from the warm server; the wall time of ten loads through the plugin, and of a
memory gate of five strategies, against one bare script each that makes the same loads in one process; where each second
of the plugin's loads goes; what importing the entry module costs an unrelated pytest run; and which heavy modules are
left loaded at its end.

The plugin and the bare script take turns, run by run, since a shared machine drifts; a ratio is given as the median and
the range over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_llmload.host.loads.preloaded_modules import BASE
from pytest_llmload.host.loads.processes import LoadProcess, Server, environment
from pytest_llmload.host.settings.settings import default_cache
from pytest_llmload.system.protocol import Message
from pytest_llmload.worker.checkpoints.resolve import resolve

LOADS = 10
#: Preset -> new tokens, with 128 of prompt. The first is so small that what a measurement costs in any case shows: a
#: process of its own, an allocator that is pinned while it loads, reading the kernel's accounts, the checks.
MODELS = {"moe-128m": 32, "llama-1b": 8, "llama-7b": 32}
#: The models of a plain run, on two CPU cores.
SMALL = ("moe-128m", "llama-1b")
#: What a memory gate compares: variants of the ready-made suite, and the loads of the bare script.
STRATEGIES: dict[str, dict[str, object]] = {
    "fp16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
#: The entry module must not cost an unrelated run more than this, in seconds.
ENTRY_GOAL = 0.003
START_GOAL = 0.1
#: Goals of ten loads, by device and preset; and of the memory gate.
RATIO_GOALS = {("cpu", "moe-128m"): 1.10, ("cpu", "llama-1b"): 1.05, ("cuda", "llama-1b"): 1.10}
GATE_GOAL = 0.8

BARE = """
import json, sys
import torch, transformers
path, loads, device, tokens, prompt = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]), 128
for kwargs in loads:
    if any(name.startswith("load_in") for name in kwargs):
        kwargs = {"quantization_config": transformers.BitsAndBytesConfig(**kwargs), "dtype": "auto"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map={"": device}, **kwargs)
    ids = torch.arange(prompt).remainder(model.config.vocab_size)[None].to(device)
    with torch.no_grad():
        logits = model(ids).logits.cpu()
    for _ in range(4):
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).cpu()
    del model, logits
"""

TEN_TESTS = f"""
import pytest
@pytest.mark.parametrize("n", range({LOADS}))
def test_load(llm_load, n):
    llm_load()
"""

GATE_TESTS = """
import pytest
@pytest.mark.dtype("fp16", "bf16")
def test_dense(llm, memory_baseline):
    memory_baseline.check(llm)
@pytest.mark.quant("int8", "nf4")
def test_quantised(llm, memory_baseline):
    memory_baseline.check(llm)
@pytest.mark.quant("nf4", double_quant=True)
def test_double_quant(llm, memory_baseline):
    memory_baseline.check(llm)
"""

#: Writes what each load's phases took, how long its process took to start and to end, and the run's own seconds.
CLOCK = """
import json, time
from pytest_llmload.host.loads import broker, processes
begin = time.perf_counter()
spent = {"loads": [], "figures": [], "start": 0.0, "end": 0.0}
def timed(name, owner, method):
    real = getattr(owner, method)
    def call(*args, **kwargs):
        since = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - since
    setattr(owner, method, call)
timed("start", broker.Broker, "start")
timed("end", processes.LoadProcess, "close")
def pytest_llmload_load_finished(config, result):
    spent["loads"].append(result.phases)
    spent["figures"].append({name: value for name, value in result.metrics.items() if name.startswith("gpu.")})
def pytest_unconfigure(config):
    spent["run"] = time.perf_counter() - begin
    open("spent.json", "w").write(json.dumps(spent))
"""


def start_times() -> list[float]:
    """Return the seconds from asking for a load process to its first answer, from a warm server."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server.log", environment(os.environ))
        try:
            server.warm_up(BASE, None)
            server.wait()
            seconds = []
            for number in range(LOADS):
                begin = time.perf_counter()
                process = server.fork(Path(folder) / f"{number}.log")
                assert isinstance(process, LoadProcess), process
                # Any request is answered; this one by an error that says which kind is unknown.
                reply: Message = process.request({"kind": "hello", "pid": 0, "rank": 0}, 60)
                seconds.append(time.perf_counter() - begin)
                assert reply["kind"] == "error"
                process.close()
            return seconds
        finally:
            server.close()


class Comparison:
    """One job that a bare script and the plugin both do, each in a process of its own, and their seconds."""

    def __init__(
        self, name: str, path: str, device: str, tokens: int, tests: str, loads: Sequence[Mapping[str, object]]
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="overhead-"))
        (self._folder / "test_loads.py").write_text(tests)
        (self._folder / "pytest.ini").write_text("[pytest]\n")
        (self._folder / "conftest.py").write_text(CLOCK)
        self._bare = [sys.executable, "-c", BARE, path, json.dumps(list(loads)), device, str(tokens)]
        options = [f"--llm-model={name}={path}", f"--llm-device={device}", f"--llm-workload=1x128+{tokens}"]
        self._plugin = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *options]
        self.pairs: list[tuple[float, float]] = []
        #: The GPU's figures of each load, in the order they were made.
        self.figures: list[dict[str, float]] = []
        self._spent: dict[str, list[float]] = defaultdict(list)

    def record(self) -> None:
        """Record the baselines that the plugin's runs are gated against."""
        self._run([*self._plugin, "--llm-update-baselines"])

    def pair(self) -> None:
        """Run the bare script and the plugin, each once; which goes first changes from pair to pair."""
        order = ("bare", "plugin") if len(self.pairs) % 2 else ("plugin", "bare")
        seconds = {which: self._run(self._bare if which == "bare" else self._plugin) for which in order}
        self.pairs.append((seconds["plugin"], seconds["bare"]))
        self._account(seconds["plugin"])

    @property
    def ratios(self) -> list[float]:
        """The plugin's seconds over the bare script's, pair by pair."""
        return [plugin / bare for plugin, bare in self.pairs]

    def table(self) -> str:
        """Say where the plugin's seconds go, as medians over its runs; the lines add up to its wall time."""
        lines = [f"    {name:<24}{statistics.median(values):8.2f} s" for name, values in self._spent.items()]
        return "\n".join(lines)

    def _account(self, wall: float) -> None:
        spent = json.loads((self._folder / "spent.json").read_text())
        self.figures += spent["figures"]
        phases: dict[str, float] = defaultdict(float)
        for load in spent["loads"]:
            for name, seconds in load.items():
                if "." not in name and name != "adapter":
                    phases[name] += seconds
        known = {"start of processes": spent["start"], **phases, "end of processes": spent["end"]}
        known["rest of the run"] = spent["run"] - sum(known.values())
        known["pytest's start and end"] = wall - spent["run"]
        for name, seconds in {**known, "wall": wall}.items():
            self._spent[name].append(seconds)

    def _run(self, command: list[str]) -> float:
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{done.stderr}")
        return seconds

    def close(self) -> None:
        """Remove the folder that the runs worked in."""
        shutil.rmtree(self._folder)


def compare(what: str, comparison: Comparison, pairs: int, goal: float | None, *, loads: int) -> None:
    """Run the pairs of one comparison, and print its ratio and where the plugin's time went.

    ``loads`` is how many different loads it makes; if it is one, the GPU's figures that are not equal in all of its
    loads are printed too.
    """
    for _ in range(pairs):
        comparison.pair()
    ratios = sorted(comparison.ratios)
    middle = statistics.median(ratios)
    plugin, bare = (statistics.median(side) for side in zip(*comparison.pairs, strict=True))
    text = f"plugin / bare script = {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {pairs} pairs"
    told = "" if goal is None else f"; goal {goal:g}, {verdict(middle <= goal)}"
    print(f"{what}: {text}; {plugin:.1f} and {bare:.1f} s{told})\n{comparison.table()}", flush=True)
    if loads == 1 and comparison.figures:
        spread = {name: {figures[name] for figures in comparison.figures} for name in comparison.figures[0]}
        print("  not equal in all loads:", {name: sorted(found) for name, found in spread.items() if len(found) > 1})
    comparison.close()


def entry_import() -> float:
    """Return the seconds that importing the entry module adds to an interpreter that has pytest loaded; a median."""
    code = (
        "import pytest, _pytest.config, time; _pytest.config.get_config(); b = time.perf_counter(); "
        "import pytest_llmload.plugin; print(time.perf_counter() - b)"
    )
    # As installed: with byte code, whatever this shell says of writing it. The first run writes it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=env) for _ in range(16)]
    return statistics.median(float(run.stdout) for run in runs[1:])


def left_loaded() -> list[str]:
    """Return heavy modules at the very end of an unrelated pytest run that are not there without the plugin."""
    modules = _loaded_at_the_end()
    ours = [name for name in modules if name.startswith("pytest_llmload")]
    print(f"  our modules left loaded: {len(ours)}")
    # Another plugin of this environment may import them.
    return sorted({"torch", "numpy", "transformers"} & (modules - _loaded_at_the_end("-p", "no:llmload")))


def _loaded_at_the_end(*options: str) -> set[str]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        Path(folder, "test_x.py").write_text("def test_x(): pass\n")
        Path(folder, "conftest.py").write_text(
            "import json, sys\n"
            "def pytest_unconfigure(config):\n"
            "    open('left.json', 'w').write(json.dumps(sorted(sys.modules)))\n"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return set(json.loads(Path(folder, "left.json").read_text()))


def verdict(good: bool) -> str:
    """Say whether a goal is met."""
    return "met" if good else "MISSED"


def fixed_costs() -> None:
    """Print what does not depend on a model."""
    starts = start_times()
    later = statistics.median(starts[1:])
    goal = f"goal {START_GOAL * 1e3:.0f} ms, {verdict(later <= START_GOAL)}"
    print(f"start of an isolated load, after the first: {later * 1e3:.1f} ms ({goal}; first {starts[0] * 1e3:.1f} ms)")
    entry = entry_import()
    goal = f"goal {ENTRY_GOAL * 1e3:.0f} ms, {verdict(entry <= ENTRY_GOAL)}"
    print(f"import of the entry module: {entry * 1e3:.1f} ms ({goal})")
    left = left_loaded()
    print(f"heavy modules left loaded by an unrelated run: {', '.join(left) or 'none'} ({verdict(not left)})")


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of them; by default moe-128m and llama-1b")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=1, help="runs of each side; five or more for a figure to quote")
    parser.add_argument("--only", choices=("fixed", "ten", "gate"), help="one part; by default fixed and ten")
    options = parser.parse_args()
    if options.only in (None, "fixed"):
        fixed_costs()
    for model in [options.model] if options.model else SMALL if options.only != "fixed" else ():
        path, tokens = resolve(f"random:{model}", default_cache()).path, MODELS[model]
        device = "cuda:0" if options.device == "cuda" else "cpu"
        if options.only in (None, "ten"):
            ten = Comparison(model, path, options.device, tokens, TEN_TESTS, [{"dtype": "auto"}] * LOADS)
            goal = RATIO_GOALS.get((options.device, model))
            compare(f"{LOADS} measured loads of {model} on {device}", ten, options.pairs, goal, loads=1)
        if options.only == "gate":
            gate = Comparison(model, path, options.device, tokens, GATE_TESTS, list(STRATEGIES.values()))
            gate.record()
            compare(
                f"a memory gate of {model}: {', '.join(STRATEGIES)}",
                gate,
                options.pairs,
                GATE_GOAL,
                loads=len(STRATEGIES),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
