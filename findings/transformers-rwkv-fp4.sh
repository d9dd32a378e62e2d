#!/usr/bin/env bash
# transformers' RWKV: a model that was loaded in nf4 serves partly in fp4. Before it runs for the first time, the class
# divides the output weights of its blocks by a power of two (by one in the first six), and quantises them again with
# bitsandbytes' default type, whatever the load asked for.
# A good guess: what from_pretrained returns in nf4 stays in nf4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2 numpy==2.4.6
venv/bin/python - <<'PYTHON' 2> log || { cat log; exit 1; }
from collections import Counter

import bitsandbytes, torch, transformers

config = transformers.RwkvConfig(hidden_size=128, num_hidden_layers=2, vocab_size=512, context_length=128)
torch.manual_seed(0)
transformers.RwkvForCausalLM(config).save_pretrained("model")
quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = transformers.AutoModelForCausalLM.from_pretrained("model", quantization_config=quantised, device_map="cpu")


def types():
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return dict(Counter(state.quant_type for state in states if state is not None))


before = types()
with torch.no_grad():
    model(torch.arange(8)[None])
after = types()
print(f"transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}: RWKV's weights are {before} "
      f"when they are loaded, and {after} after the first forward")
assert set(before) == {"nf4"} and after.get("fp4"), "they stay in nf4 now"
PYTHON
