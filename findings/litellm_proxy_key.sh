#!/usr/bin/env bash
# LiteLLM 1.106.12's proxy with a master key and no database, installed as its documentation says ('litellm[proxy]'),
# does not answer 401 to a key that is missing or wrong: a request without a key is an internal error, 500 without a
# reason, and one with a wrong key is 400 "No connected db.".
# A good guess: a refused key is 401 or 403, as with every other server; 500 is the server's fault, 400 the request's.
# The cause of the 500 is in the proxy's log: its handler of the refusal imports prisma, which 'litellm[proxy]' lacks.
# Exits 1 once that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2> /dev/null || true; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet 'litellm[proxy]==1.106.12'
cat > config.yaml <<'YAML'
model_list:
  - model_name: tiny
    litellm_params: {model: openai/tiny, api_key: none, mock_response: "one two three"}
general_settings: {master_key: sk-0123456789abcdef0123456789abcdef}
YAML
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
LITELLM_LOCAL_MODEL_COST_MAP=True venv/bin/litellm --config config.yaml --host 127.0.0.1 --port "$port" > log 2>&1 &
server=$!
cat > ask.py <<'PY'
import sys
import time
import urllib.error
import urllib.request

base = f"http://127.0.0.1:{sys.argv[1]}"


def ask(path, key):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(base + path, headers=headers))
    except urllib.error.HTTPError as error:
        answer = error
    return answer.status, answer.read().decode()


for _ in range(600):
    try:
        ask("/health/readiness", "")
        break
    except OSError:
        time.sleep(0.2)
keys = {"none": "", "wrong": "sk-wrong", "right": "sk-0123456789abcdef0123456789abcdef"}
found = {name: ask("/v1/models", key) for name, key in keys.items()}
for name, (status, text) in found.items():
    print(f"GET /v1/models, key {name}: {status} {text[:100]}")
sys.exit([status for status, _ in found.values()] != [500, 400, 200])
PY
venv/bin/python ask.py "$port"
grep -m1 "No module named 'prisma'" log
