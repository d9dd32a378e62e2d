#!/usr/bin/env bash
# What needs one GPU and none of the long shapes: each part can be run alone.
#
#   benchmarks/one_gpu.sh OUT paired overhead served deepspeed placement xdist latency
#
# OUT gets the logs, the reports and the baselines.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
model=${MODEL:-random:llama-1b}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
printf '[pytest]\n' > pytest.ini

gate() {
    "$python" -m pytest -p no:cacheprovider -p no:randomly --llm-model="$model" --llm-baselines="$out/baselines" "$@"
}

paired() {
    "$python" "$here/paired_load.py" --model "$model" --device cuda --pairs 20
}

overhead() {
    "$python" "$here/overhead.py" --model "${model#random:}" --device cuda
}

served() {
    cat > test_served.py <<'PY'
import pytest


@pytest.mark.strategy("served")
@pytest.mark.dtype("bf16")
@pytest.mark.quant("none", "nf4")
def test_served(llm, memory_baseline):
    memory_baseline.check(llm)
    print({name: round(value, 4) for name, value in llm.metrics.items() if isinstance(value, float)})
PY
    gate -rA --llm-update-baselines test_served.py
    gate -rA --llm-report="$out/served.json" test_served.py
}

deepspeed() {
    cat > test_deepspeed.py <<'PY'
import pytest


@pytest.mark.strategy("deepspeed", world_size=1, kernel_inject=True)
def test_kernels(llm, memory_baseline):
    memory_baseline.check(llm)


@pytest.mark.strategy("deepspeed", world_size=1)
@pytest.mark.xfail(raises=Exception, reason="over one rank there is nothing to split", strict=True)
def test_one_rank(llm):
    pass
PY
    gate -rA --llm-update-baselines test_deepspeed.py
    gate -rA --llm-report="$out/deepspeed.json" test_deepspeed.py
}

placement() {
    gate --llm-update-baselines --pyargs pytest_llmload.suite --llm-strategy=max_memory --llm-strategy=offload
    gate -v --pyargs pytest_llmload.suite --llm-strategy=max_memory --llm-strategy=offload --durations=8
}

xdist() {
    # Two workers on one GPU take turns: the same verdicts as a serial run.
    gate -q --llm-update-baselines --pyargs pytest_llmload.suite --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=int8
    gate -v --pyargs pytest_llmload.suite --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=int8
    gate -v -n 2 --pyargs pytest_llmload.suite --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=int8
}

for part in "$@"; do
    begin=$SECONDS
    echo "=== $part"
    "$part" 2>&1 | tee "$out/$part.log"
    echo "=== $part: $((SECONDS - begin)) s"
done
tar -C "$out" -czf "$out/baselines.tar.gz" baselines 2>/dev/null || true
