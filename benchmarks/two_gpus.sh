#!/usr/bin/env bash
# What needs two GPUs: each part can be run alone.
#
#   benchmarks/two_gpus.sh OUT maps quantised limits parallel batches deepspeed odd killed listening side_by_side ten_each
#
# parts.sh says what OUT gets. MODEL is what maps, quantised, limits, parallel and batches load. MODES=-q only gates: what
# was recorded on other GPUs, copied to these GPUs' key, is compared, and `llmload accept` records it from the report.
source "$(dirname "$0")/parts.sh"
model=${MODEL:-random:polyglot-ko-12.8b}
name=${model#random:}

# What is recorded and gated, with a report of the last.
told() {
    again --llm-report="$out/$1-$name.json" -rs "${@:2}"
}

# A load over both GPUs, each of which holds a part that counts; its markers are the arguments.
shared_by_two() {
    {
        printf 'import pytest\n\n\n@pytest.mark.gpu_count(2)\n'
        printf '@pytest.mark.%s\n' "$@"
        cat <<'PY'
def test_shared(llm, memory_baseline):
    memory_baseline.check(llm)
    assert all(gpu.weights_share > 0.3 for gpu in llm.memory.gpus), llm.memory.gpus
PY
    } > test_shared.py
}

maps() {
    shared_by_two 'dtype("fp16")' 'strategy("auto", "balanced")'
    told maps test_shared.py
}

quantised() {
    shared_by_two 'strategy("auto")' 'quant("int8", "nf4")'
    told quantised test_shared.py
}

# The map of the field report that this project began with: what two GPUs of 10 GiB leave goes to the CPU.
limits() {
    cat > test_limits.py <<'PY'
import pytest


@pytest.mark.gpu_count(2)
@pytest.mark.dtype("fp16")
@pytest.mark.strategy("max_memory", max_memory={0: "10GiB", 1: "10GiB", "cpu": "30GiB"})
def test_limits(llm, memory_baseline):
    memory_baseline.check(llm)
PY
    told limits test_limits.py --llm-workload=1x128+2
}

parallel() {
    cat > test_parallel.py <<'PY'
import pytest


@pytest.mark.dtype("fp16")
@pytest.mark.strategy("single", "tensor_parallel", "tp_plan")
def test_parallel(llm, memory_baseline):
    memory_baseline.check(llm)
PY
    told parallel test_parallel.py
}

# Whether splitting pays where a prompt's arithmetic is more than its launches.
batches() {
    cat > test_batches.py <<'PY'
import pytest


@pytest.mark.dtype("fp16")
@pytest.mark.strategy("single", "tensor_parallel", "tp_plan")
def test_batches(llm):
    times = {name: round(value, 4) for name, value in llm.metrics.items() if name in ("load", "ttft", "per_token")}
    print(f"{llm.spec.slug} {llm.spec.workload}: {times}")
PY
    local workload
    for workload in ${WORKLOADS:-1x128+32 8x1024+16}; do
        gate -rA --llm-workload="$workload" --llm-report="$out/batches-$name-$workload.json" test_batches.py
    done
}

# DeepSpeed's automatic tensor parallelism over two NCCL ranks.
deepspeed() {
    cat > test_deepspeed.py <<'PY'
import pytest


@pytest.mark.dtype("fp16")
@pytest.mark.strategy("deepspeed", world_size=2)
def test_split(llm, memory_baseline):
    memory_baseline.check(llm)
    assert len(llm.generate("Hello", max_new_tokens=4).tokens) == 4
PY
    model=random:llama-1b told deepspeed test_deepspeed.py
}

# Shapes that are hard to split: fused experts, an embedding tied to the head, one key and value head for two ranks.
# Each load is applied, refused or failed with its cause, and never wrong without a word.
odd() {
    mkdir -p experts tied one_kv_head
    local llama='"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
 "vocab_size": 32000, "torch_dtype": "float16"'
    cat > experts/config.json <<JSON
{"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
 "num_key_value_heads": 2, "tie_word_embeddings": false, $llama}
JSON
    cat > tied/config.json <<JSON
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4, "tie_word_embeddings": true, $llama}
JSON
    cat > one_kv_head/config.json <<JSON
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, "tie_word_embeddings": false, $llama}
JSON
    cat > test_odd.py <<'PY'
import pytest


@pytest.mark.dtype("fp16")
@pytest.mark.strategy("tp_plan", "tensor_parallel")
def test_odd(llm):
    print(f"{llm.spec.slug}: {[round(gpu.weights_share, 3) for gpu in llm.memory.gpus]} {llm.result.notes}")
PY
    local shape
    for shape in experts tied one_kv_head; do
        model="$shape=random:$work/$shape" gate -q -rA --llm-report="$out/odd-$shape.json" test_odd.py
    done
}

# Which addresses the processes of a load listen on, while its ranks compute together over NCCL.
listening() {
    cat > test_listening.py <<'PY'
import psutil
import pytest


def addresses(model, tokenizer):
    import os

    family = [each for each in psutil.process_iter() if os.getsid(each.pid) == os.getsid(0)]
    sockets = [socket for each in family for socket in each.net_connections("inet")]
    return sorted({socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN})


@pytest.mark.dtype("fp16")
@pytest.mark.strategy("tp_plan", "deepspeed")
def test_listening(llm):
    assert len(llm.generate("Hello", max_new_tokens=2).tokens) == 2
    found = llm.run(addresses)
    print(f"{llm.spec.slug} listens on {found}")
    assert set(found) <= {"127.0.0.1", "::1"}
PY
    model=random:llama-1b gate -q -rA test_listening.py
}

# A rank killed while it loads and while it generates, and one that the other waits for in a collective; the tests after
# it find both GPUs free, or fail.
killed() {
    cat > planted.py <<'PY'
import os
import signal
import threading

from pytest_llmload.strategies.tp_plan import TpPlan


class Hung(TpPlan):
    name, fields = "hung", {"strategy": "hung", "world_size": 2}

    def load(self, job, kwargs):
        import torch

        loaded = super().load(job, kwargs)
        if os.environ["RANK"] == "1":
            threading.Event().wait()
        torch.distributed.all_reduce(torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
        return loaded


class Killed(TpPlan):
    name, fields = "killed", {"strategy": "killed", "world_size": 2}

    def load(self, job, kwargs):
        loaded = super().load(job, kwargs)
        if os.environ["RANK"] == "1":
            print("about to be killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return loaded
PY
    cat > conftest.py <<'PY'
def pytest_llmload_strategies(config):
    return {"killed": "planted:Killed", "hung": "planted:Hung"}
PY
    cat > test_killed.py <<'PY'
import os
import signal

import pynvml
import pytest

from pytest_llmload import LoadCrashed, LoadTimeout


def users():
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [process.pid for handle in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]


def plant(model, tokenizer):
    if os.environ["RANK"] == "1":
        model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def test_killed_while_loading(llm_load):
    with pytest.raises(LoadCrashed, match="rank 1 was killed by SIGKILL in phase 'load'"):
        llm_load(strategy="killed")
    assert users() == []


def test_hung_in_a_collective(llm_load):
    with pytest.raises(LoadTimeout, match="still in phase 'load'") as caught:
        llm_load(strategy="hung")
    print(caught.value)
    assert users() == []


@pytest.mark.strategy("tp_plan")
def test_killed_while_generating(llm):
    llm.run(plant)
    with pytest.raises(LoadCrashed, match="rank 1 was killed by SIGKILL in phase 'generate'") as caught:
        llm.generate("Hello")
    print(caught.value)
    assert users() == []


@pytest.mark.strategy("tp_plan")
def test_is_loaded_anew(llm):
    assert len(llm.generate("Hello", max_new_tokens=4).tokens) == 4
PY
    model=random:llama-1b gate -v -rA --llm-timeout=45s test_killed.py
    rm conftest.py
    nvidia-smi --query-compute-apps=pid,used_memory --format=csv
}

# Two workers, a GPU each: figures as those of one after the other; and a test that wants both waits for them.
side_by_side() {
    cat > test_side.py <<'PY'
import time

import pytest


@pytest.mark.dtype("fp16")
@pytest.mark.quant("none", "int8", "nf4")
def test_one(llm, memory_baseline):
    print(f"{llm.spec.slug} was there at {time.time():.1f}")
    memory_baseline.check(llm)


@pytest.mark.gpu_count(2)
@pytest.mark.strategy("auto")
def test_both(llm, memory_baseline):
    print(f"{llm.spec.slug} was there at {time.time():.1f}")
    memory_baseline.check(llm)
PY
    local model=${SIDE:-random:llama-7b}
    gate -q --llm-update-baselines --llm-report="$out/alone.json" test_side.py
    time gate -rA --llm-report="$out/serial.json" test_side.py
    time gate -rA -n 2 --llm-report="$out/side_by_side.json" test_side.py
}

# Ten loads on each GPU: two workers against one, as whole runs in turn; the goal is 0.6 of the time. TEN names what the
# ten loads of each worker are, as keywords of llm_load.
ten_each() {
    local model=${SIDE:-random:llama-1b} turn workers begin each
    echo 'import pytest' > test_ten_each.py
    for each in ${TEN:-dtype=fp16 dtype=bf16}; do
        cat >> test_ten_each.py <<PY


@pytest.mark.parametrize("number", range(10))
def test_${each#*=}(llm_load, number):
    llm_load(${each%=*}="${each#*=}")
PY
    done
    for turn in $(seq "${TURNS:-2}"); do
        for workers in 0 2; do
            begin=$EPOCHREALTIME
            gate -q -n "$workers" test_ten_each.py || return 1
            echo "turn $turn, -n $workers: $(awk "BEGIN { print $EPOCHREALTIME - $begin }") s"
        done
    done
}

run_parts "$@"
