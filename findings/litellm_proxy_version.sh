#!/usr/bin/env bash
# LiteLLM 1.106.12's proxy tells its version in the header x-litellm-version of a completion only: neither GET /v1/models
# nor /health/readiness tells it, by header or by body. What wants to know which release it talks to must have it
# generate something first. Exits 1 once that changes.
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
import importlib.metadata
import json
import sys
import time
import urllib.request

base = f"http://127.0.0.1:{sys.argv[1]}"
key = {"Authorization": "Bearer sk-0123456789abcdef0123456789abcdef", "Content-Type": "application/json"}


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    answer = urllib.request.urlopen(urllib.request.Request(base + path, data, key))
    return answer.headers.get("x-litellm-version"), answer.read().decode()


for _ in range(600):
    try:
        ask("/health/readiness")
        break
    except OSError:
        time.sleep(0.2)
version = importlib.metadata.version("litellm")
found = {path: ask(path) for path in ("/health/readiness", "/v1/models")}
message = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
completed = ask("/v1/chat/completions", message)[0]
print("litellm", version)
for path, (header, text) in found.items():
    print(f"GET {path}: x-litellm-version {header}; {text[:120]}")
print(f"POST /v1/chat/completions: x-litellm-version {completed}")
sys.exit(completed != version or any(header or version in text for header, text in found.values()))
PY
venv/bin/python ask.py "$port"
