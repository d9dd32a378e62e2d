#!/usr/bin/env bash
# transformers 4.57.6, `transformers serve`: a stream that ends because max_new_tokens was reached says
# finish_reason "stop", never "length", and has no usage, although the request asks for it. A client cannot tell an
# answer that was cut at its limit from one that the model ended. /v1/models lists models that it does not have.
# Exits 1 once that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2> /dev/null || true; rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 'transformers[serving]==4.57.6' tokenizers==0.22.2
cat > model.py <<'PY'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<eos>", *(f"w{number}" for number in range(63))]
tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<eos>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
fast.save_pretrained("tiny")
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=0, **shape)).save_pretrained("tiny")
PY
venv/bin/python model.py
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
HF_HUB_OFFLINE=1 venv/bin/transformers serve --force_model "$work/tiny" --host 127.0.0.1 --port "$port" --device cpu \
    > log 2>&1 &
server=$!
cat > ask.py <<'PY'
import json
import sys
import time
import urllib.request

base = f"http://127.0.0.1:{sys.argv[1]}"
for _ in range(600):
    try:
        urllib.request.urlopen(f"{base}/health").read()
        break
    except OSError:
        time.sleep(0.2)
config = json.dumps({"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False})
body = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, "generation_config": config}
body["messages"] = [{"role": "user", "content": "w1 w2 w3"}]
request = urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
lines = urllib.request.urlopen(request).read().decode().splitlines()
events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
reasons = [choice["finish_reason"] for event in events for choice in event["choices"] if choice.get("finish_reason")]
texts = [choice for event in events for choice in event["choices"] if choice["delta"].get("content")]
usage = [event["usage"] for event in events if event.get("usage")]
listed = [row["id"] for row in json.loads(urllib.request.urlopen(f"{base}/v1/models").read())["data"]]
print(f"8 tokens asked for and generated in {len(texts)} pieces: finish_reason {reasons}, usage {usage}")
print(f"served: tiny; listed by /v1/models: {len(listed)} models, the first {listed[0]}")
sys.exit(reasons != ["stop"] or bool(usage) or "tiny" in " ".join(listed))
PY
venv/bin/python -c 'import transformers; print("transformers", transformers.__version__)'
venv/bin/python ask.py "$port"
