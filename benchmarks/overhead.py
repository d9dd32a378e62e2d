"""What the plugin itself costs, as ratios against bare scripts in the same run.

    python benchmarks/overhead.py                              (make bench: two models, on the CPU)
    python benchmarks/overhead.py --model llama-1b --device cuda

Prints: the time to start an isolated load from the warm server; the wall time of ten loads through the plugin against
one bare script that does the same ten loads in one process; what importing the entry module costs an unrelated pytest
run; and which heavy modules are left loaded at its end.

The two runs of ten loads take turns, load by load: a shared machine drifts within a minute by more than is looked for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_llmload.host.loads.preloaded_modules import BASE
from pytest_llmload.host.loads.processes import LoadProcess, Server, environment
from pytest_llmload.host.settings.options import default_cache
from pytest_llmload.system.protocol import Message
from pytest_llmload.worker.checkpoints.resolve import resolve

LOADS = 10
#: Preset -> new tokens, with 128 of prompt. The first is so small that what a measurement costs in any case shows: a
#: process of its own, an allocator that is pinned while it loads, reading the kernel's accounts, the checks.
MODELS = {"moe-128m": 32, "llama-1b": 8}
#: The entry module must not cost an unrelated run more than this, in seconds.
ENTRY_GOAL = 0.003
START_GOAL = 0.1
RATIO_GOAL = 1.1

#: Whoever loads says that it is about to, and waits for its turn.
TURN = """
import os
go, ready = map(int, os.environ["TURN"].split())
def turn():
    os.write(ready, b".")
    assert os.read(go, 1), "nobody waits for this load"
"""

BARE = (
    TURN
    + """
import sys
import transformers
path, loads, device, tokens, prompt = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), 128
import torch
for _ in range(loads):
    turn()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map={"": device})
    ids = torch.arange(prompt).remainder(model.config.vocab_size)[None].to(device)
    with torch.no_grad():
        logits = model(ids).logits.cpu()
    for _ in range(4):
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False).cpu()
    del model
"""
)

TESTS = (
    TURN
    + """
import pytest
@pytest.mark.parametrize("n", range({loads}))
def test_load(llm_load, n):
    turn()
    llm_load()
"""
)


def start_times() -> list[float]:
    """Seconds from asking for a load process to its first answer, from a warm server."""
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
                reply: Message = process.request({"kind": "no such request"}, 60)
                seconds.append(time.perf_counter() - begin)
                assert reply["kind"] == "error"
                process.close()
            return seconds
        finally:
            server.close()


class Loads:
    """A process that loads in turns, and the seconds that it had in all: its start, its loads, its end."""

    def __init__(self, command: list[str], folder: str) -> None:
        go, self._go = os.pipe()
        self._ready, ready = os.pipe()
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "TURN": f"{go} {ready}"},
            pass_fds=(go, ready),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        os.close(go)
        os.close(ready)
        self._until_ready()
        self.seconds = time.perf_counter() - begin

    def one(self) -> None:
        """One load, until the next one is about to begin."""
        begin = time.perf_counter()
        os.write(self._go, b".")
        self._until_ready()
        self.seconds += time.perf_counter() - begin

    def last(self) -> None:
        """The last load, and the process's end."""
        begin = time.perf_counter()
        os.write(self._go, b".")
        output, _ = self._process.communicate()
        self.seconds += time.perf_counter() - begin
        if self._process.returncode:
            raise SystemExit(output.decode(errors="replace"))

    def _until_ready(self) -> None:
        if not os.read(self._ready, 1):
            raise SystemExit(self._process.communicate()[0].decode(errors="replace"))


def ten_loads(path: str, device: str, tokens: int) -> float:
    """Wall time of ten measured loads through the plugin over that of a bare script that does the same."""
    bare = [sys.executable, "-c", BARE, path, str(LOADS), device, str(tokens)]
    options = [f"--llm-model={path}", f"--llm-device={device}", f"--llm-workload=1x128+{tokens}"]
    plugin = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", *options]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_loads.py").write_text(TESTS.format(loads=LOADS))
        Path(folder, "pytest.ini").write_text("[pytest]\n")
        both = theirs, ours = Loads(bare, folder), Loads(plugin, folder)
        for _ in range(LOADS - 1):
            for each in both:
                each.one()
        for each in both:
            each.last()
        return ours.seconds / theirs.seconds


def entry_import() -> float:
    """Seconds that importing the entry module adds to an interpreter that has pytest loaded; median of fresh ones."""
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
    """Heavy modules at the very end of an unrelated pytest run that are not there without the plugin."""
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
    return "as wanted" if good else "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of them; default: all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    starts = start_times()
    later = statistics.median(starts[1:])
    goal = f"goal {START_GOAL * 1e3:.0f} ms, {verdict(later <= START_GOAL)}"
    print(f"start of an isolated load, after the first: {later * 1e3:.1f} ms ({goal}; first {starts[0] * 1e3:.1f} ms)")
    for model in [options.model] if options.model else MODELS:
        path = resolve(f"random:{model}", default_cache()).path
        ratio = ten_loads(path, options.device, MODELS[model])
        goal = f"goal {RATIO_GOAL}, {verdict(ratio <= RATIO_GOAL)}"
        print(
            f"{LOADS} measured loads of {model} on {options.device}: plugin / bare script = {ratio:.2f} ({goal})",
            flush=True,
        )
    entry = entry_import()
    goal = f"goal {ENTRY_GOAL * 1e3:.0f} ms, {verdict(entry <= ENTRY_GOAL)}"
    print(f"import of the entry module: {entry * 1e3:.1f} ms ({goal})")
    left = left_loaded()
    print(f"heavy modules left loaded by an unrelated run: {', '.join(left) or 'none'} ({verdict(not left)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
