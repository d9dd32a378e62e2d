#!/usr/bin/env bash
# transformers serve in bf16 and nf4 on one GPU, gated against the committed baselines, which an H100 recorded.
#
#   benchmarks/served_gpu.sh OUT
#
# On a GPU of another kind the H100's memory is the baseline of the first gate (its figures are copied to this GPU's
# name): what a model needs is the same, what CUDA's context takes may not be. Then this GPU's own baselines are recorded
# and gated once. OUT gets the logs, the reports and the baselines; stdout gets one table.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$here/..:${PYTHONPATH:-}" HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1
"$python" -c 'import httpx' || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
recorded=nvidia-h100-80gb-hbm3
key=$("$python" -c 'from pytest_llmload.host.loads.hardware import detect; print(detect("cuda").key)') || exit 1
rm -rf "$out/baselines"
mkdir -p "$out/baselines/llama-1b/$key"
cp "$here/../baselines/llama-1b/$recorded"/served-*.json "$out/baselines/llama-1b/$key/"

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
    local name=$1
    shift
    "$python" -m pytest -p no:cacheprovider "${plugin[@]}" --llm-model=random:llama-1b --llm-device=cuda \
        --llm-record-repeats=1 --llm-baselines="$out/baselines" --llm-report="$out/$name.json" -q "$@" test_served.py \
        > "$out/$name.log" 2>&1
    echo "$name: exit $?, $(tail -1 "$out/$name.log")"
}

# Not installed, pytest does not find it by itself.
plugin=()
"$python" -c 'import importlib.metadata as m; m.distribution("pytest-llmload")' 2> /dev/null ||
    plugin=(-p pytest_llmload.plugin)
gate h100
gate record --llm-update-baselines
gate own

"$python" - "$out" "$here/../baselines/llama-1b/$recorded" << 'PY'
import json
import sys
from pathlib import Path

out, recorded = map(Path, sys.argv[1:])
print(f"{'load':<14}{'metric':<18}{'H100, committed':>16}{'gate':>16}{'own':>16}")
reports = {name: json.loads((out / f"{name}.json").read_text()) for name in ("h100", "own")}
loads = {name: {run["variant"]: run for run in report["runs"]} for name, report in reports.items()}
for file in sorted(recorded.glob("served-*.json")):
    memory = json.loads(file.read_text())["memory"]
    for metric in (*memory, "load", "ttft", "per_token", "served.total.x8"):
        row = [memory.get(metric), *(loads[name].get(file.stem, {}).get("metrics", {}).get(metric) for name in loads)]
        shown = ["-" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value / 2**20:,.0f} MiB" for value in row]
        print(f"{file.stem:<14}{metric:<18}" + "".join(f"{text:>16}" for text in shown))
for name in loads:
    for slug, load in loads[name].items():
        print(name, slug, load["verdict"], *load["messages"], *(problem["message"] for problem in load["problems"]))
PY
