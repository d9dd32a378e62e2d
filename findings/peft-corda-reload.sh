#!/usr/bin/env bash
# A CorDA adapter cannot be loaded from the folder that save_pretrained() wrote.
#
# A good guess: what save_pretrained() writes, PeftModel.from_pretrained() reads, as it does for LoRA and for PiSSA.
# Seen: the saved configuration keeps init_lora_weights="corda", loading runs the initialisation again, and that needs
# statistics of activations which only the training script collected (peft/tuners/lora/layer.py, `corda_init`):
# "`eigens` attribute not found for layer". The same folder loads once the setting says true.
# Exits with 1 once that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 attrs==26.1.0 \
    datasets==5.2.0
cd "$folder"
./venv/bin/python - <<'PY'
import json
import pathlib
import sys
import warnings

import peft
import torch
import transformers
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

warnings.simplefilter("ignore")
torch.manual_seed(0)
shape = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=128
)
transformers.LlamaForCausalLM(shape).save_pretrained("base")


def base():
    return transformers.LlamaForCausalLM.from_pretrained("base")


model = base()
setting = peft.LoraConfig(
    r=4, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"),
    target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
)
preprocess_corda(model, setting, run_model=lambda: model(torch.arange(32)[None]))
peft.get_peft_model(model, setting).save_pretrained("adapter")
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
try:
    peft.PeftModel.from_pretrained(base(), "adapter")
    refused = ""
except ValueError as error:
    refused = str(error)
print("as saved:", refused or "loads")
file = pathlib.Path("adapter/adapter_config.json")
file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": True}))
peft.PeftModel.from_pretrained(base(), "adapter")
print("with init_lora_weights true: loads (on a base that CorDA did not change)")
sys.exit("eigens" not in refused)
PY
