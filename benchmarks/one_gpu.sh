#!/usr/bin/env bash
# What needs one GPU: each part can be run alone.
#
#   benchmarks/one_gpu.sh OUT paired overhead served deepspeed memory adapters offload xdist latency
#
# OUT gets the logs, the reports and the baselines, which begin as the committed ones; a further call goes on with them.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
model=${MODEL:-random:llama-1b}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -e "$out/baselines" ] || cp -r "$here/../baselines" "$out/baselines"
cd "$work"
printf '[pytest]\n' > pytest.ini

gate() {
    "$python" -m pytest -p no:cacheprovider -p no:randomly --llm-model="$model" --llm-baselines="$out/baselines" "$@"
}

paired() {
    "$python" "$here/paired_load.py" --model "$model" --device cuda --pairs "${PAIRS:-20}"
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

# On one GPU there is nothing to split: DeepSpeed's own kernels, for the architectures whose blocks still return what
# those kernels return. The first load on a machine compiles them.
deepspeed() {
    mkdir -p gpt-j-1.3b gpt-neo-1.3b
    cat > gpt-j-1.3b/config.json <<'JSON'
{"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "n_embd": 2048, "n_layer": 24, "n_head": 16, "rotary_dim": 64,
 "n_positions": 2048, "vocab_size": 50432, "torch_dtype": "float16", "tie_word_embeddings": false}
JSON
    cat > gpt-neo-1.3b/config.json <<'JSON'
{"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "hidden_size": 2048, "num_layers": 24, "num_heads": 16,
 "attention_types": [[["global", "local"], 12]], "vocab_size": 50304, "max_position_embeddings": 2048,
 "window_size": 256, "torch_dtype": "float16"}
JSON
    cat > test_deepspeed.py <<'PY'
import pytest


@pytest.mark.strategy("deepspeed", world_size=1, kernel_inject=True)
def test_kernels(llm, memory_baseline):
    memory_baseline.check(llm)
PY
    local shape mode
    for shape in ${SHAPES:-gpt-j-1.3b gpt-neo-1.3b}; do
        for mode in --llm-update-baselines --llm-report="$out/deepspeed-$shape.json"; do
            model="$shape=random:$work/$shape" gate -q "$mode" test_deepspeed.py
        done
    done
}

# The committed baselines, brought up to date and gated once against what was written; MODES=--llm-record-missing gates.
again() {
    local mode
    for mode in ${MODES:---llm-update-baselines --llm-record-missing}; do
        gate "$mode" --pyargs pytest_llmload.suite --llm-record-repeats=1 "$@"
    done
}

memory() {
    model=random:polyglot-ko-12.8b again -k test_memory \
        --llm-strategy=fp16 --llm-strategy=bf16 --llm-strategy=int8 --llm-strategy=nf4
}

adapters() {
    model=random:polyglot-ko-5.8b again -k test_memory --llm-adapter=random \
        --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=lora --llm-strategy=qlora
}

offload() {
    model=random:polyglot-ko-12.8b again --llm-workload=1x128+2 --llm-strategy=max_memory --llm-strategy=offload
}

xdist() {
    # Two workers on one GPU take turns: the same verdicts as a serial run.
    gate -q --llm-update-baselines --pyargs pytest_llmload.suite --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=int8
    gate -v --pyargs pytest_llmload.suite --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=int8
    gate -v -n 2 --pyargs pytest_llmload.suite --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=int8
}

# Slowdowns that nobody asked for; planted/ has the module that plants each in the load's processes. What the committed
# baseline lacks is recorded first.
latency() {
    cat > test_times.py <<'PY'
def test_memory(llm, memory_baseline):
    memory_baseline.check(llm)


def test_times(llm, latency_baseline):
    latency_baseline.check(llm)
PY
    local limit=${LATENCY:-60s} plant
    time gate -q --llm-record-missing --llm-latency-time="${RECORDING:-150s}" --llm-report="$out/recorded.json" test_times.py
    time gate -q --llm-latency-time="$limit" --llm-report="$out/clean.json" test_times.py
    for plant in ${PLANTS-no_cache sync_per_layer falls_back read_twice}; do
        echo "--- planted: $plant"
        time PYTHONPATH="$here/planted:${PYTHONPATH:-}" gate -q --llm-latency-time="$limit" --llm-import="$plant" test_times.py
    done
}

for part in "$@"; do
    begin=$SECONDS
    echo "=== $part"
    "$part" 2>&1 | tee "$out/$part.log"
    echo "=== $part: $((SECONDS - begin)) s"
done
tar -C "$out" -czf "$out/baselines.tar.gz" baselines
