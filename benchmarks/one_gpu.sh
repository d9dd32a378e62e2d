#!/usr/bin/env bash
# What needs one GPU: each part can be run alone. Served loads are in served_gpu.sh.
#
#   benchmarks/one_gpu.sh OUT paired overhead committed deepspeed memory adapters offload xdist latency
#
# parts.sh says what OUT gets.
source "$(dirname "$0")/parts.sh"
model=${MODEL:-random:llama-1b}

paired() {
    "$python" "$here/paired_load.py" --model "$model" --device cuda --pairs "${PAIRS:-20}"
}

overhead() {
    "$python" "$here/overhead.py" --model "${model#random:}" --device cuda
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

memory() {
    model=random:polyglot-ko-12.8b again --pyargs pytest_llmload.suite -k test_memory \
        --llm-strategy=fp16 --llm-strategy=bf16 --llm-strategy=int8 --llm-strategy=nf4
}

adapters() {
    model=random:polyglot-ko-5.8b again --pyargs pytest_llmload.suite -k test_memory --llm-adapter=random \
        --llm-strategy=bf16 --llm-strategy=nf4 --llm-strategy=lora --llm-strategy=qlora
}

offload() {
    model=random:polyglot-ko-12.8b again --pyargs pytest_llmload.suite --llm-workload=1x128+2 \
        --llm-strategy=max_memory --llm-strategy=offload
}

# The committed baselines of models that one GPU holds in any precision, gated as they are; then the allocator's figures
# against a bare script's, to the byte.
committed() {
    cat > test_committed.py <<'PY'
import pytest


@pytest.mark.dtype("fp16")
def test_dense(llm, memory_baseline):
    memory_baseline.check(llm)


@pytest.mark.dtype("fp16")
@pytest.mark.quant("int8", "nf4")
def test_quantised(llm, memory_baseline):
    memory_baseline.check(llm)
PY
    cat > test_as_stored.py <<'PY'
def test_memory(llm, memory_baseline):
    memory_baseline.check(llm)
PY
    model=random:llama-7b gate -q --llm-report="$out/committed-7b.json" test_committed.py
    model=random:llama-1b gate -q --llm-report="$out/committed-1b.json" test_as_stored.py
    "$python" "$here/against_bare.py" "$out/committed-7b.json"
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

run_parts "$@"
