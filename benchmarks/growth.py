"""Growth over many loads in one session: memory, threads, open files and children of pytest's side and of the server.

    python benchmarks/growth.py                        (500 loads of tiny-llama on the CPU)
    python benchmarks/growth.py --loads 20

Loads are forked from one warm server, measured and closed, as in a run. After a tenth of the loads the figures are
taken for the first time, and at the end again. Exits with 1 if resident memory has grown by more than 1 MiB and 2 KiB a
load, if there are more threads, open files or children, or if anything of ours is left in TMPDIR.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from clean_gates import TIMEOUT, job_of

from pytest_llmload.core.job import EVERYTHING
from pytest_llmload.core.spec import Workload
from pytest_llmload.host.loads.preloaded_modules import BASE, architecture
from pytest_llmload.host.loads.processes import LoadProcess, fork
from pytest_llmload.host.loads.warm_server import WarmServer, variables
from pytest_llmload.host.settings.settings import default_cache
from pytest_llmload.system.proc import status
from pytest_llmload.system.process_tree import descendants
from pytest_llmload.worker.checkpoints.resolve import resolve

#: Bytes of resident memory that each load may add, and what pages come and go in between.
ALLOWED, NOISE = 2 << 10, 1 << 20


def figures(pid: int) -> dict[str, int]:
    """Return what may grow in a process: bytes, and counts."""
    proc = Path("/proc") / str(pid)
    return {
        "memory": status(pid)["RssAnon"],
        "threads": sum(1 for _ in (proc / "task").iterdir()),
        "files": sum(1 for _ in (proc / "fd").iterdir()),
        "children": len(descendants(pid)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, default=500)
    parser.add_argument("--model", default="tiny-llama", help="a preset of random weights")
    options = parser.parse_args()
    checkpoint = resolve(f"random:{options.model}", default_cache())
    job = job_of("none", checkpoint, Workload(1, 16, 2), EVERYTHING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = f"{folder}/tmp"
        Path(tempfile.tempdir).mkdir()
        server = WarmServer(Path(folder) / "server.log", variables(os.environ))
        try:
            server.warm_up([*BASE, *architecture(checkpoint.model_type)], None)
            server.wait()
            pids = {"pytest's side": os.getpid(), "the warm server": server._process.pid}
            first = max(2, options.loads // 10)
            before: dict[str, dict[str, int]] = {}
            for number in range(options.loads):
                process = fork(server, Path(folder) / "load.log")
                assert isinstance(process, LoadProcess), process
                reply = process.request({"kind": "load", "job": job.to_json()}, TIMEOUT)
                assert reply["kind"] == "result", reply
                process.close()
                if number + 1 == first:
                    before = {name: figures(pid) for name, pid in pids.items()}
            after = {name: figures(pid) for name, pid in pids.items()}
        finally:
            server.close()
        left = [path.name for path in Path(tempfile.tempdir).iterdir() if "llmload" in path.name]
    return told(before, after, options.loads - first, left)


def told(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]], loads: int, left: list[str]) -> int:
    """Print the growth over so many loads, and return 1 if it is more than is allowed."""
    grown = 0
    print(f"over {loads} loads:")
    for name, figures_before in before.items():
        for what, value in figures_before.items():
            growth = after[name][what] - value
            allowed = NOISE + ALLOWED * loads if what == "memory" else 0
            grown |= growth > allowed
            print(f"  {name:16} {what:9} {value:11} -> {after[name][what]:11}  {growth:+} (allowed {allowed})")
    print(f"  left in TMPDIR: {', '.join(left) or 'nothing'}")
    return 1 if grown or left else 0


if __name__ == "__main__":
    sys.exit(main())
