#!/usr/bin/env bash
# Who did it, on a GPU: a planted kept copy and a planted transient must be named by file, function and line, and 4 MiB
# that each call of the model keeps must be a figure.
#
#   benchmarks/who_did_it_gpu.sh [random:llama-1b]
#
# PYTHON names the interpreter. Prints the lines of the failures that name who allocated, and exits with 1 where the
# planted line is not among them, or the growth not found. DEVICE=cpu runs the same on the CPU.
set -uo pipefail
model=${1:-random:llama-1b}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1
printf '[pytest]\n' > pytest.ini
cat > planted_kept.py <<'PY'
import transformers

COPIES = []
_load = transformers.PreTrainedModel.from_pretrained.__func__


def keeps_a_copy(cls, *args, **kwargs):
    given = _load(cls, *args, **kwargs)
    model = given[0] if isinstance(given, tuple) else given
    COPIES.append(next(model.parameters()).detach().clone())  # planted
    return given


transformers.PreTrainedModel.from_pretrained = classmethod(keeps_a_copy)
PY
cat > planted_transient.py <<'PY'
import torch
import transformers

_load = transformers.PreTrainedModel.from_pretrained.__func__


def needs_more_for_a_moment(cls, *args, **kwargs):
    given = _load(cls, *args, **kwargs)
    model = given[0] if isinstance(given, tuple) else given
    size = (32 << 20) + sum(parameter.nbytes for parameter in model.parameters())
    torch.ones(size, dtype=torch.uint8, device=next(model.parameters()).device)  # planted
    return given


transformers.PreTrainedModel.from_pretrained = classmethod(needs_more_for_a_moment)
PY
cat > planted_leak.py <<'PY'
import torch
import transformers

KEPT = []
_load = transformers.PreTrainedModel.from_pretrained.__func__


def keeps_more_with_each_call(model, *_):
    KEPT.append(torch.ones(4 << 20, dtype=torch.uint8, device=next(model.parameters()).device))


def leaks(cls, *args, **kwargs):
    given = _load(cls, *args, **kwargs)
    (given[0] if isinstance(given, tuple) else given).register_forward_pre_hook(keeps_more_with_each_call)
    return given


transformers.PreTrainedModel.from_pretrained = classmethod(leaks)
PY
gate() {
    "$python" -m pytest -q -p no:cacheprovider -p no:randomly --pyargs pytest_llmload.suite -k "test_memory" \
        --llm-model="$model" --llm-strategy=bf16 --llm-device="${DEVICE:-cuda}" "$@" 2>&1
}
gate --llm-update-baselines | tail -3
status=0
for fault in planted_kept planted_transient; do
    line=$(grep -n '# planted' "$fault.py" | cut -d: -f1)
    # A different name for the imported module is a different load: the same baseline, with the fault imported.
    gate --llm-import="$fault" --llm-report="$fault.json" > "$fault.txt"
    echo "== $fault (line $line)"
    grep -E "^E? +(memory |gpu\.|host\.|allocated|[0-9.]+ [KMG]iB .* by )" "$fault.txt" | head -14
    if grep -q "$fault.py:$line in " "$fault.txt"; then
        echo "NAMED"
    else
        echo "NOT NAMED"
        tail -30 "$fault.txt"
        status=1
    fi
    "$python" - "$fault.json" <<'PY'
import json, sys

for run in json.load(open(sys.argv[1]))["runs"]:
    for each in run["allocations"][:4]:
        print("  report:", each["moment"], each["place"], each["bytes"], each["site"], each["held_by"])
PY
done
gate --llm-import=planted_leak > planted_leak.txt
echo "== planted_leak (4 MiB a call)"
grep -E "^ +(memory|gpu|host)\.?growth|growth " planted_leak.txt | head -4
if grep -qE "(gpu|host)\.growth .* -> " planted_leak.txt; then
    echo "FOUND"
else
    echo "NOT FOUND"
    tail -30 planted_leak.txt
    status=1
fi
exit $status
