"""Measure what the plugin itself costs, as ratios against bare scripts in the same run.

    python benchmarks/overhead.py                              (make bench: two models, on the CPU)
    python benchmarks/overhead.py --model llama-1b --device cuda --pairs 5
    python benchmarks/overhead.py --only gate --model llama-7b --device cuda
    python benchmarks/overhead.py --only clean --model llama-1b --device cuda --old FOLDER

Prints the time to start an isolated load from the warm server; the wall time of ten loads through the plugin, and of a
memory gate of five strategies, against one bare script each that makes the same loads in one process; the wall time of
a gate of one load against that of a different version of this package, whose checkout is FOLDER; where each second of
the plugin's runs goes; what importing the entry module costs an unrelated pytest run; and which heavy modules are left
loaded at its end.

The two sides of a comparison take turns, run by run, since a shared machine drifts; a ratio is given as the median and
the range over the pairs. ``--seconds`` bounds the time of each comparison: no pair is begun that would not end in it.
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
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pytest_llmload.host.loads.preloaded_modules import BASE
from pytest_llmload.host.loads.processes import LoadProcess, fork
from pytest_llmload.host.loads.warm_server import WarmServer, variables
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
#: Goals of ten loads, by device and preset; of the memory gate; and of a gate of one load against the old version.
RATIO_GOALS = {("cpu", "moe-128m"): 1.10, ("cpu", "llama-1b"): 1.05, ("cuda", "llama-1b"): 1.10}
GATE_GOAL = 0.8
CLEAN_GOAL = 0.6
#: The checkout that this script is in.
ROOT = Path(__file__).resolve().parent.parent

#: The bare script; its last line says where its own seconds went.
BARE = """
import time
spent, since = {}, time.perf_counter()
def took(name):
    global since
    now = time.perf_counter()
    spent[name] = spent.get(name, 0.0) + now - since
    since = now
import json, sys
import torch, transformers
path, loads, device, tokens, prompt = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]), 128
took("import")
for kwargs in loads:
    if any(name.startswith("load_in") for name in kwargs):
        kwargs = {"quantization_config": transformers.BitsAndBytesConfig(**kwargs), "dtype": "auto"}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, device_map={"": device}, **kwargs)
    took("load")
    ids = torch.arange(prompt).remainder(model.config.vocab_size)[None].to(device)
    with torch.no_grad():
        logits = model(ids).logits.cpu()
    took("forward")
    for _ in range(4):
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).cpu()
    took("four generations")
    del model, logits
    took("release")
print(json.dumps(spent))
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

#: The gate of one load.
CLEAN_TESTS = """
import pytest
@pytest.mark.{marker}
def test_memory(llm, memory_baseline):
    memory_baseline.check(llm)
"""
CLEAN = {"bf16": 'dtype("bf16")', "nf4": 'quant("nf4")'}

#: Writes which package a run imported.
WHICH = """
from pathlib import Path
import pytest_llmload
Path("package.txt").write_text(pytest_llmload.__file__)
"""


def start_times() -> list[float]:
    """Return the seconds from asking for a load process to its first answer, from a warm server."""
    with tempfile.TemporaryDirectory() as folder:
        server = WarmServer(Path(folder) / "server.log", variables(os.environ))
        try:
            server.warm_up(BASE, None)
            server.wait()
            seconds = []
            for number in range(LOADS):
                begin = time.perf_counter()
                process = fork(server, Path(folder) / f"{number}.log")
                assert isinstance(process, LoadProcess), process
                # Any request is answered; this one by an error that says which kind is unknown.
                reply: Message = process.request({"kind": "hello", "pid": 0, "rank": 0}, 60)
                seconds.append(time.perf_counter() - begin)
                assert reply["kind"] == "error"
                process.close()
            return seconds
        finally:
            server.close()


class Side:
    """One of the two commands that a comparison runs in turn, in a folder of its own."""

    def __init__(self, name: str, command: Sequence[str], root: Path | None = None) -> None:
        """Make a side; ``root`` is the checkout of the package that the command uses."""
        self.name = name
        self.folder = Path(tempfile.mkdtemp(prefix="overhead-"))
        self._command = [sys.executable, *command]
        paths = [str(root), str(ROOT / "benchmarks")] if root is not None else []
        inherited = os.environ.get("PYTHONPATH")
        self._env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([inherited] if inherited else [])])}
        self._root = root
        self.seconds: list[float] = []
        #: What each run said of itself.
        self.told: list[dict[str, Any]] = []

    def run(self, *options: str) -> float:
        """Run the command once; return its seconds. Raises SystemExit with what it printed if it fails."""
        begin = time.perf_counter()
        done = subprocess.run(
            [*self._command, *options], cwd=self.folder, capture_output=True, text=True, check=False, env=self._env
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise SystemExit(f"{self.name} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        if self._root is not None:
            used = Path(self.folder, "package.txt").read_text()
            assert Path(used).is_relative_to(self._root), f"{self.name} used {used}, not {self._root}"
        spent = self.folder / "spent.json"
        if spent.exists():
            found = json.loads(spent.read_text())
            found["seconds"]["start and end of the interpreter"] = seconds - found["run"]
            self.told.append(found)
        elif self._root is None:
            self.told.append({"seconds": json.loads(done.stdout.splitlines()[-1])})
        return seconds

    def measure(self) -> float:
        """Run once, and keep the seconds."""
        self.seconds.append(self.run())
        return self.seconds[-1]

    def table(self) -> str:
        """Say where the seconds go, as means over its runs, so that the lines add up to the wall time."""
        names = list(dict.fromkeys(name for told in self.told for name in told["seconds"]))
        means = {name: statistics.fmean(told["seconds"].get(name, 0.0) for told in self.told) for name in names}
        known = sum(means.values())
        rest = {"interpreter": statistics.fmean(self.seconds) - known} if self._root is None else {}
        lines = [f"    {name:<34}{value:8.2f} s" for name, value in {**means, **rest}.items() if value >= 0.005]
        return "\n".join(lines)

    def close(self) -> None:
        """Remove the folder that the runs worked in."""
        shutil.rmtree(self.folder)


def plugin_side(name: str, tests: str, options: Sequence[str], *, root: Path = ROOT, clock: bool = True) -> Side:
    """Return the side of a pytest run of ``tests`` with this package, or with the one in ``root``."""
    # Without an entry point (a checkout that is only on the path), the plugin is named.
    named = [] if "llmload" in entry_points(group="pytest11").names else ["-p", "pytest_llmload.plugin"]
    clocked = ["-p", "host_clock"] if clock else []
    side = Side(name, ["-m", "pytest", "-q", "-p", "no:randomly", *named, *clocked, *options], root)
    (side.folder / "test_loads.py").write_text(tests)
    (side.folder / "pytest.ini").write_text("[pytest]\n")
    (side.folder / "conftest.py").write_text(WHICH)
    return side


def compare(what: str, first: Side, second: Side, limits: argparse.Namespace, goal: float | None) -> dict[str, Any]:
    """Run both sides in turn, print the ratio of their seconds and where they went, and return all that was measured.

    Which side goes first changes from pair to pair.
    """
    begin = time.perf_counter()
    longest = 0.0
    while len(first.seconds) < limits.pairs and (
        not first.seconds or time.perf_counter() - begin + longest <= limits.seconds
    ):
        order = (second, first) if len(first.seconds) % 2 else (first, second)
        longest = max(longest, sum(side.measure() for side in order))
    ratios = [one / other for one, other in zip(first.seconds, second.seconds, strict=True)]
    middle, pairs = statistics.median(ratios), len(ratios)
    told = "" if goal is None else f"; goal {goal:g}, {verdict(middle <= goal)}"
    print(
        f"{what}: {first.name} / {second.name} = {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs; "
        f"{statistics.median(first.seconds):.2f} and {statistics.median(second.seconds):.2f} s{told})"
    )
    for side in (first, second):
        if side.told:
            print(f"  {side.name}:\n{side.table()}", flush=True)
    return {
        "what": what,
        "ratios": ratios,
        "sides": {side.name: {"seconds": side.seconds, "told": side.told} for side in (first, second)},
    }


def spread(side: Side) -> None:
    """Print the GPU's figures that are not equal in all loads of a side whose loads are the same."""
    loads = [load["figures"] for told in side.told for load in told["loads"]]
    if loads and loads[0]:
        found = {name: sorted({figures[name] for figures in loads}) for name in loads[0]}
        print("  not equal in all loads:", {name: values for name, values in found.items() if len(values) > 1})


def ten_loads(model: str, limits: argparse.Namespace) -> dict[str, Any]:
    """Compare ten loads of one model with the bare script's."""
    path, tokens = made(model), MODELS[model]
    loads: list[Mapping[str, object]] = [{"dtype": "auto"}] * LOADS
    plugin = plugin_side("plugin", TEN_TESTS, options_of(model, path, limits.device, tokens))
    bare = bare_side(path, loads, limits.device, tokens)
    what = f"{LOADS} measured loads of {model} on {torch_device(limits.device)}"
    found = compare(what, plugin, bare, limits, RATIO_GOALS.get((limits.device, model)))
    spread(plugin)
    plugin.close()
    bare.close()
    return found


def gate(model: str, limits: argparse.Namespace) -> dict[str, Any]:
    """Compare a memory gate of several strategies with the bare script's loads; record its baselines first."""
    path, tokens = made(model), MODELS[model]
    options = options_of(model, path, limits.device, tokens)
    if limits.baselines is not None:
        options.append(f"--llm-baselines={limits.baselines.resolve()}")
    plugin = plugin_side("plugin", GATE_TESTS, options)
    bare = bare_side(path, list(STRATEGIES.values()), limits.device, tokens)
    if limits.baselines is None or not limits.baselines.exists():
        plugin.run("--llm-update-baselines", "--llm-record-repeats=1")
        plugin.told.clear()
    found = {}
    if limits.pairs:
        found = compare(f"a memory gate of {model}: {', '.join(STRATEGIES)}", plugin, bare, limits, GATE_GOAL)
    plugin.close()
    bare.close()
    return found


def clean(model: str, limits: argparse.Namespace) -> dict[str, Any]:
    """Compare a gate of one load with that of the version in ``limits.old``; each side records its own baseline."""
    path, tokens = made(model), MODELS[model]
    options = options_of(model, path, limits.device, tokens)
    found = {}
    for name, marker in CLEAN.items():
        tests = CLEAN_TESTS.format(marker=marker)
        new = plugin_side("this version", tests, options)
        old = plugin_side("old version", tests, options, root=limits.old.resolve(), clock=False)
        for side in (new, old):
            side.run("--llm-update-baselines", "--llm-record-repeats=1")
            side.told.clear()
        what = f"a clean memory gate of one load, {model} {name} on {torch_device(limits.device)}"
        found[name] = compare(what, new, old, limits, CLEAN_GOAL)
        new.close()
        old.close()
    return found


def made(model: str) -> str:
    """Return the folder of a preset's checkpoint, built if it is not there."""
    return resolve(f"random:{model}", default_cache()).path


def build(model: str, device: str) -> None:
    """Build a preset's checkpoint, and load it once with the bare script.

    On a machine that has just started, the first process that uses the device reads gigabytes of CUDA's libraries from
    the disk. Without this run, that would count against the side which comes first.
    """
    bare = bare_side(made(model), [{"dtype": "auto"}], device, tokens=1)
    print(f"a first load of {model} with the bare script: {bare.run():.1f} s")
    bare.close()


def bare_side(path: str, loads: Sequence[Mapping[str, object]], device: str, tokens: int) -> Side:
    """Return the side of the bare script, which makes these loads one after the other."""
    return Side("bare script", ["-c", BARE, path, json.dumps(loads), torch_device(device), str(tokens)])


def torch_device(kind: str) -> str:
    """Return torch's name of the device that the loads use."""
    return "cuda:0" if kind == "cuda" else "cpu"


def options_of(model: str, path: str, device: str, tokens: int) -> list[str]:
    """Return the plugin's options for a checkpoint."""
    return [f"--llm-model={model}={path}", f"--llm-device={device}", f"--llm-workload=1x128+{tokens}"]


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
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each comparison, at most")
    parser.add_argument(
        "--only", choices=("build", "fixed", "ten", "gate", "clean"), help="one part; by default fixed and ten"
    )
    parser.add_argument("--baselines", type=Path, help="the gate's baselines; recorded if the folder is not there")
    parser.add_argument("--old", type=Path, help="the checkout of the version that --only clean compares with")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    options = parser.parse_args()
    if options.only == "clean" and options.old is None:
        parser.error("--only clean needs --old FOLDER, a checkout of the version to compare with")
    if options.only in (None, "fixed"):
        fixed_costs()
    parts = {"ten": ten_loads, "gate": gate, "clean": clean}
    found: dict[str, dict[str, Any]] = {}
    for model in [options.model] if options.model else SMALL if options.only != "fixed" else ():
        if options.only == "build":
            build(model, options.device)
        elif options.only != "fixed":
            found[model] = parts[options.only or "ten"](model, options)
            if options.json is not None:
                options.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
