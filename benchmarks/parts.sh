# Sourced by the scripts that run part after part: their arguments are OUT and the parts, and OUT is shifted off.
#
# OUT gets the logs, the reports and the baselines, which begin as the committed ones; a further call goes on with them.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -e "$out/baselines" ] || cp -r "$here/../baselines" "$out/baselines"
cd "$work"
printf '[pytest]\n' > pytest.ini

gate() {
    "$python" -m pytest -p no:cacheprovider -p no:randomly --llm-model="$model" --llm-baselines="$out/baselines" "$@"
}

# What is recorded, brought up to date and gated once against what was written; MODES=--llm-record-missing gates.
again() {
    local mode
    for mode in ${MODES:---llm-update-baselines --llm-record-missing}; do
        gate "$mode" --llm-record-repeats=1 "$@"
    done
}

run_parts() {
    local part begin
    for part in "$@"; do
        begin=$SECONDS
        echo "=== $part"
        "$part" 2>&1 | tee "$out/$part.log"
        echo "=== $part: $((SECONDS - begin)) s"
    done
    tar -C "$out" -czf "$out/baselines.tar.gz" baselines
}
