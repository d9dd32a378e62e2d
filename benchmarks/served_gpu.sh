#!/usr/bin/env bash
# transformers serve in bf16 and nf4 on one GPU, gated against the committed baselines, which an H100 recorded.
#
#   benchmarks/served_gpu.sh OUT
#
# On a GPU of another kind the H100's memory is the baseline of the first gate (its figures are copied to this GPU's
# name): what a model needs is the same, what CUDA's context takes may not be. Then this GPU's own baselines are recorded
# and gated once. stdout gets the lines of each gate and one table. OUT gets the logs, the reports and, in
# baselines.tar.gz, the baselines that were recorded.
#
# It takes six loads: about six minutes on an H100, without network. Python needs pytest, cloudpickle, filelock,
# nvidia-ml-py, torch, transformers 5, accelerate, bitsandbytes and httpx, and for `transformers serve` fastapi, starlette,
# uvicorn, click, h11, openai, pydantic, requests, rich, typer and what these need: annotated-doc, annotated-types, anyio, httpcore2, httpx2,
# idna, jiter, opentelemetry-api, pydantic_core, sniffio, truststore, typing-inspection, typing_extensions. They may be
# on PYTHONPATH; the plugin itself need not be installed.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here/..:${PYTHONPATH:-}" HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1
# What is missing would only skip the tests.
"$python" -c 'import bitsandbytes, fastapi, httpx, openai, uvicorn, transformers.cli.transformers' || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
recorded=nvidia-h100-80gb-hbm3
key=$("$python" -c 'from pytest_llmload.host.loads.hardware import detect; print(detect("cuda").key)') || exit 1
mkdir -p "$work/baselines/llama-1b/$key"
cp "$here/../baselines/llama-1b/$recorded"/served-*.json "$work/baselines/llama-1b/$key/"

cd "$work"
printf '[pytest]\n' > pytest.ini
cat > test_served.py <<'PY'
import pytest


@pytest.mark.strategy("served")
@pytest.mark.dtype("bf16")
@pytest.mark.quant("none", "nf4")
def test_served(llm, memory_baseline):
    memory_baseline.check(llm)
PY

gate() {
    local name=$1 begin=$SECONDS
    shift
    "$python" -m pytest -p no:cacheprovider "${plugin[@]}" --llm-model=random:llama-1b --llm-device=cuda \
        --llm-require-hardware --llm-record-repeats=1 --llm-baselines="$work/baselines" --llm-report="$out/$name.json" \
        -rA "$@" test_served.py \
        > "$out/$name.log" 2>&1
    echo "$name: exit $?, $(tail -1 "$out/$name.log") ($((SECONDS - begin)) s)"
}

# Not installed, pytest does not find it by itself.
plugin=()
"$python" -c 'import importlib.metadata as m; m.distribution("pytest-llmload")' 2> /dev/null ||
    plugin=(-p pytest_llmload.plugin)
gate h100
gate record --llm-update-baselines
tar -C "$work" -czf "$out/baselines.tar.gz" baselines
gate own

"$python" - "$out" "$here/../baselines/llama-1b/$recorded" << 'PY'
import json
import sys
from pathlib import Path

out, recorded = map(Path, sys.argv[1:])
print(f"{'load':<16}{'metric':<16}{'H100, committed':>16}{'gate':>16}{'own':>16}")
reports = {name: json.loads((out / f"{name}.json").read_text()) for name in ("h100", "own")}
loads = {name: {run["variant"]: run for run in report["runs"]} for name, report in reports.items()}
for file in sorted(recorded.glob("served-*.json")):
    memory = json.loads(file.read_text())["memory"]
    for metric in (*memory, "load", "ttft", "per_token", "served.total.x8"):
        row = [memory.get(metric), *(loads[name].get(file.stem, {}).get("metrics", {}).get(metric) for name in loads)]
        shown = ["-" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value / 2**20:,.0f} MiB" for value in row]
        print(f"{file.stem:<16}{metric:<16}" + "".join(f"{text:>16}" for text in shown))
for name in loads:
    for slug, load in loads[name].items():
        print(name, slug, load["verdict"], *load["messages"], *(problem["message"] for problem in load["problems"]))
PY
