#!/usr/bin/env bash
# The table of docs/strategies.md: record one model under several strategies, gate once against what was recorded, then
# hold the figures against a bare script and against the planner. Run it on a machine with a GPU:
#
#   benchmarks/strategies.sh random:polyglot-ko-12.8b OUT --llm-strategy=fp16 --llm-strategy=nf4
#
# OUT gets the baselines, the reports and the log.
set -uo pipefail
model=$1 out=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
mkdir -p "$out"
printf '[pytest]\n' > "$work/pytest.ini"
cd "$work"
gate() {
    "$python" -m pytest -p no:cacheprovider -p no:randomly --pyargs pytest_llmload.suite \
        --llm-model="$model" --llm-baselines="$out/baselines" "$@"
}
gate --llm-update-baselines --llm-report="$out/record.json" "${@}"
gate --llm-report="$out/gate.json" "${@}"
"$python" "$here/against_bare.py" "$out/gate.json"
"$python" "$here/against_planner.py" "$out/gate.json"
rm -rf "$work"
