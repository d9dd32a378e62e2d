#!/usr/bin/env bash
# transformers serve in bf16 and nf4 on one GPU, gated against the committed baselines.
#
#   benchmarks/served_gpu.sh OUT
#
# On a GPU without committed baselines, the memory that an H100 recorded is the baseline of the first gate (its figures
# are copied to this GPU's name): what a model needs is the same, what CUDA's context takes may not be. Then this GPU's
# own baselines are recorded and gated once; the exit status is that of these two. stdout gets the lines of each gate and
# one table. OUT gets the logs, the reports and, in baselines.tar.gz, the baselines that were recorded.
#
# It takes six loads: about four minutes on an H200, without network. Python needs pytest, cloudpickle, filelock,
# nvidia-ml-py, torch, transformers 5, accelerate, bitsandbytes and httpx, and for `transformers serve` fastapi, starlette,
# uvicorn, click, h11, openai, pydantic, requests, rich, typer and what these need: annotated-doc, annotated-types, anyio,
# httpcore2, httpx2, idna, jiter, opentelemetry-api, pydantic_core, sniffio, truststore, typing-inspection,
# typing_extensions. They may be on PYTHONPATH; the plugin itself need not be installed.
#
# MODEL=random:tiny-llama DEVICE=cpu tries the script without a GPU, in some two minutes on two cores. In nf4 the host
# memory of so small a server may differ by more than its tolerance (docs/strategies/served.md).
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export model=${MODEL:-random:llama-1b} device=${DEVICE:-cuda}
name=${model#random:}
export PYTHONPATH="$(dirname "$here"):${PYTHONPATH:-}" HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1
# What is missing would only skip the tests.
"$python" -c 'import bitsandbytes, fastapi, httpx, openai, uvicorn, transformers.cli.transformers' || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
key=$("$python" -c 'import os; from pytest_llmload.host.loads.hardware import detect; print(detect(os.environ["device"]).key)') ||
    exit 1
mkdir -p "$work/baselines/$name/$key"
committed=$here/../baselines/$name/$key
[ -e "$committed/served-bf16.json" ] || committed=$here/../baselines/$name/nvidia-h100-80gb-hbm3

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

failed=0
gate() {
    local name=$1 begin=$SECONDS status
    shift
    "$python" -m pytest -p no:cacheprovider -p no:randomly "${plugin[@]}" --llm-model="$model" --llm-device="$device" \
        --llm-require-hardware --llm-record-repeats=1 --llm-baselines="$work/baselines" --llm-report="$out/$name.json" \
        -rA "$@" test_served.py \
        > "$out/$name.log" 2>&1
    status=$?
    echo "$name: exit $status, $(tail -1 "$out/$name.log") ($((SECONDS - begin)) s)"
    return "$status"
}

# Not installed, pytest does not find it by itself.
plugin=()
"$python" -c 'import importlib.metadata as m; m.distribution("pytest-llmload")' 2> /dev/null ||
    plugin=(-p pytest_llmload.plugin)
gates=(recorded own)
if [ -d "$committed" ]; then
    gates=(committed recorded own)
    cp "$committed"/served-*.json "$work/baselines/$name/$key/"
    echo "committed: ${committed##*/}, gated on $key"
    gate committed
fi
# What is within the tolerances of another GPU's figures would be left as it is.
[ "${committed##*/}" = "$key" ] || rm -rf "$work/baselines"
gate recorded --llm-update-baselines || failed=1
tar -C "$work" -czf "$out/baselines.tar.gz" baselines
gate own || failed=1

"$python" - "$out" "$committed" "${gates[@]}" << 'PY'
import json
import sys
from pathlib import Path

out, committed, gates = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
loads = {
    gate: {run["variant"]: run for run in json.loads((out / f"{gate}.json").read_text())["runs"]}
    for gate in gates
    if (out / f"{gate}.json").exists()
}
print(f"{'load':<18}{'metric':<16}{'baseline':>14}" + "".join(f"{gate:>14}" for gate in loads))
for slug in sorted({slug for runs in loads.values() for slug in runs}):
    file = committed / f"{slug}.json"
    memory = json.loads(file.read_text())["memory"] if file.exists() else {}
    measured = [runs[slug]["metrics"] if slug in runs else {} for runs in loads.values()]
    for metric in ("gpu.process", "server.settled", "server.peak", "load", "ttft", "per_token", "served.total.x8"):
        row = [memory.get(metric), *(metrics.get(metric) for metrics in measured)]
        shown = ["-" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value / 2**20:,.0f} MiB" for value in row]
        print(f"{slug:<18}{metric:<16}" + "".join(f"{text:>14}" for text in shown))
for gate, runs in loads.items():
    for slug, load in runs.items():
        print(gate, slug, load["verdict"], *load["messages"], *(problem["message"] for problem in load["problems"]))
PY
exit "$failed"
