"""Load a tiny checkpoint of each quantised format on the GPU, and print one table: what was loaded, and what was said.

    python benchmarks/formats_gpu.py

Formats whose package is not installed are skipped by the plugin, with its reason. Takes a few minutes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Makes the checkpoints in a process of its own, so that nothing of it is in the figures.
MAKE = """
import sys, torch, transformers
from pathlib import Path
import format_files
transformers.utils.logging.disable_progress_bar()
dense, folder = Path(sys.argv[1]), Path(sys.argv[2])
for name in ("fp8", "gptq", "awq"):
    getattr(format_files, name)(dense, folder / name)
format_files.gpt_oss(folder / "mxfp4")
schemes = {
    "bnb-nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-int8": dict(load_in_8bit=True),
}
for name, settings in schemes.items():
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype="auto", device_map={"": 0}
    )
    model.save_pretrained(folder / name)
"""
CONFTEST = """
import importlib.metadata
import json
from pathlib import Path

def pytest_llmload_load_finished(config, result):
    with Path("loads.jsonl").open("a") as file:
        error = result.error
        file.write(json.dumps({
            "name": result.spec["name"],
            "quant": result.spec["quant"],
            "outcome": result.outcome,
            "problems": [problem.message for problem in result.problems],
            "quants": sorted({row.quant for row in result.manifest if row.quant}),
            "weights": result.metrics.get("gpu.weights"),
            "logical": result.metrics.get("weights.logical"),
            "notes": [note for note in result.notes if "quantis" in note or "dense" in note],
            "error": f"{error.type_name}: {error.message}" if error else "",
        }) + "\\n")
"""
TESTS = """
import pytest

@pytest.mark.quant("none")
def test_stored(llm):
    pass
"""
DENSE_TESTS = """
import pytest

@pytest.mark.quant("nf4", "int8", "fp8", "torchao-int8", "torchao-fp8", "torchao-int4", "quanto-int8", "hqq")
def test_while_loading(llm):
    pass
"""


def main() -> None:
    """Make the checkpoints, load each in pytest, and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), str(ROOT / "tests" / "worker"), os.environ.get("PYTHONPATH", "")]
            ),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        resolve = (
            "import sys; from pathlib import Path\n"
            "from pytest_llmload.worker.checkpoints.resolve import resolve\n"
            "print(resolve('random:tiny-llama', Path(sys.argv[1])).path)"
        )
        dense = _run([sys.executable, "-c", resolve, str(cache)], environment).stdout.split()[-1]
        made = _run([sys.executable, "-c", MAKE, dense, str(folder)], environment)
        if made.returncode:
            print(made.stderr[-3000:])
        for stored, tests in ((True, TESTS), (False, DENSE_TESTS)):
            project = folder / ("stored" if stored else "dense")
            project.mkdir()
            (project / "conftest.py").write_text(CONFTEST)
            (project / "test_formats.py").write_text(tests)
            names = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
            models = [f"{name}={folder / name}" for name in names] if stored else [f"dense={dense}"]
            ran = _run(
                [
                    *(sys.executable, "-m", "pytest", *_plugin(), "-q", "-rs", "--tb=short"),
                    *(f"--llm-model={model}" for model in models),
                    *("--llm-device=cuda", "--llm-workload=1x16+4", f"--llmload-cache-dir={cache}"),
                ],
                environment,
                cwd=project,
            )
            _table(project / "loads.jsonl")
            print("\n".join(line for line in ran.stdout.splitlines() if line.startswith(("SKIPPED", "ERROR"))))
            print(ran.stdout.splitlines()[-1] if ran.stdout else ran.stderr[-2000:])


def _run(command: list[str], environment: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def _plugin() -> list[str]:
    """Name the plugin where it is not installed, but only on the path."""
    installed = any(point.name == "llmload" for point in importlib.metadata.entry_points(group="pytest11"))
    return [] if installed else ["-p", "pytest_llmload.plugin"]


def _table(file: Path) -> None:
    for line in file.read_text().splitlines() if file.exists() else ():
        load = json.loads(line)
        print(f"{load['name']} / {load['quant']}: {load['outcome']}")
        print(f"  gpu.weights {load['weights']}, logical {load['logical']}, manifest {load['quants']}")
        for text in (*load["problems"], load["error"], *load["notes"]):
            if text:
                print(f"  - {' '.join(text.split())[:300]}")


if __name__ == "__main__":
    main()
