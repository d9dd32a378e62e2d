#!/usr/bin/env bash
# Every strategy on one GPU with small models: record, then gate. Prints what failed.
set -u
out=${1:?a folder for reports}
work=$(mktemp -d)
cd "$work"
printf '[pytest]\n' > pytest.ini
run() { python3 -m pytest -p pytest_llmload.plugin -p no:cacheprovider --pyargs pytest_llmload.suite "$@" 2>&1 | cut -c1-240 | tail -90; }
for model in tiny-llama tiny-gpt-neox; do
    run --llm-model=random:$model --llm-update-baselines --llm-report="$out/$model-record.json"
    run --llm-model=random:$model --llm-report="$out/$model-gate.json"
done
