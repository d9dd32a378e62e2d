#!/usr/bin/env bash
# Record baselines, gate against them, and see a planted regression being caught. Needs no GPU and no download.
set -euo pipefail
python=$(realpath -s "$1")
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here"/*.py "$work"
cd "$work"

step() { printf '\n\033[1m%s\033[0m\n\n' "$*"; }
gate() { "$python" -m pytest -q -p no:randomly --llm-model=random:tiny-llama --llm-device=cpu "$@"; }

step '1. Record: load under each strategy, twice, and write baselines/ (commit it)'
gate --llm-update-baselines
find baselines -type f | sort

step '2. Gate a pull request: nothing changed, so it is green'
gate

step '3. The same with a quantiser that silently dropped double quantisation: it must turn red'
if gate --llm-import=planted; then
    echo 'the planted regression was NOT caught' >&2
    exit 1
fi
printf '\n\033[1mCaught.\033[0m\n'
