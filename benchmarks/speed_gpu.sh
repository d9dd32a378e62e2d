#!/usr/bin/env bash
# How fast a load is on one GPU, against a bare script and against an older version of this package.
#
#   OLD=/path/to/old/checkout benchmarks/speed_gpu.sh OUT [build record ten gate clean profile]
#
# Prints ratios (median, range, number of pairs) and where the seconds went; OUT gets the same as PART.txt, and all that
# was measured as PART.json. Each part ends within some 150 s, and one that fails does not keep the others from running.
#
#   build     makes the checkpoints: the 1B (2.5 GB), and the 7B (13.5 GB) unless SMALL=1; loads each once, uncounted
#   record    records the 7B gate's baselines, in OUT/gate-baselines
#   ten       ten loads of the 1B: the plugin and the bare script in turn, up to PAIRS (5), as many as fit in LIMIT (130 s)
#   gate      the 7B memory gate of five strategies and the bare script, in turn; needs no baselines if ``record`` ran
#   clean     a gate of one 1B load in bf16 and of one in nf4, this version and that in OLD in turn; LIMIT/2 for each
#   profile   ten loads of the 1B and the first gate of the 1B, each phase under the profiler (profile.txt)
#
# PYTHON names the interpreter (python3); DEVICE=cpu ONE=moe-128m FIVE=moe-128m tries the script without a GPU.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
python=${PYTHON:-python3}
limit=${LIMIT:-130}
pairs=${PAIRS:-5}
one=${ONE:-llama-1b}
five=${FIVE:-llama-7b}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1

overhead() {
    timeout -k 5 "${KILL:-200}" "$python" "$here/overhead.py" --device "${DEVICE:-cuda}" "$@" 2>&1
}

build() {
    overhead --only build --model "$one"
    [ -n "${SMALL:-}" ] || overhead --only build --model "$five"
}

record() {
    overhead --only gate --model "$five" --pairs 0 --baselines "$out/gate-baselines"
}

ten() {
    overhead --only ten --model "$one" --pairs "$pairs" --seconds "$limit" --json "$out/ten.json"
}

gate() {
    overhead --only gate --model "$five" --pairs "$pairs" --seconds "$limit" --baselines "$out/gate-baselines" \
        --json "$out/gate.json"
}

clean() {
    overhead --only clean --model "$one" --pairs "$pairs" --seconds "$((limit / 2))" --old "${OLD:?a checkout}" \
        --json "$out/clean.json"
}

profile() {
    local work
    work=$(mktemp -d)
    printf '[pytest]\n' > "$work/pytest.ini"
    cat > "$work/test_loads.py" <<'PY'
import pytest


@pytest.mark.parametrize("n", range(3))
def test_load(llm_load, n):
    llm_load()


@pytest.mark.quant("nf4")
def test_quantised(llm):
    llm.memory
PY
    (
        cd "$work" &&
            PROFILE_OUT=$work PYTHONPATH="$here:$PYTHONPATH" timeout -k 5 140 "$python" -m pytest -q -p no:randomly \
                -p no:cacheprovider -p host_clock --llm-model=random:$one --llm-device="${DEVICE:-cuda}" --llm-workload=1x128+8 \
                --llm-import=profile_load | tail -n 3
        for file in *.txt; do
            echo "##### process ${file%.txt}"
            cat "$file"
        done > "$out/processes.txt"
        cp spent.json "$out/profile.json"
    )
    rm -rf "$work"
}

for part in "${@:-build record ten gate clean profile}"; do
    for name in $part; do
        begin=$SECONDS
        ("$name") > "$out/$name.txt" 2>&1 || echo "(ended with $?)" >> "$out/$name.txt"
        echo "=== $name: $((SECONDS - begin)) s"
        tail -n 60 "$out/$name.txt"
    done
done
