#!/usr/bin/env bash
# A transient copy during the load, which the caching allocator hides from every peak: it must be caught by the count.
set -uo pipefail
model=${1:-random:tiny-llama}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
printf '[pytest]\n' > pytest.ini
cat > planted.py <<'PY'
import torch
import transformers

_load = transformers.PreTrainedModel.from_pretrained.__func__


def _with_a_transient_copy(cls, *args, **kwargs):
    torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    return _load(cls, *args, **kwargs)


transformers.PreTrainedModel.from_pretrained = classmethod(_with_a_transient_copy)
PY
gate() {
    "$python" -m pytest -q -p no:cacheprovider -p no:randomly --pyargs pytest_llmload.suite -k test_memory \
        --llm-model="$model" --llm-strategy=fp16 "$@"
}
gate --llm-update-baselines
gate --llm-import=planted && { echo "NOT CAUGHT"; exit 1; }
exit 0
