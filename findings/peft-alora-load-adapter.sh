#!/usr/bin/env bash
# An activated LoRA (aLoRA) that transformers' load_adapter() attaches never activates.
#
# A good guess: model.load_adapter(DIR) and PeftModel.from_pretrained(model, DIR) give the same outputs.
# Seen: with load_adapter() the adapter is loaded, active and enabled, and the logits are the base model's to the bit,
# with the invocation tokens in the prompt; PeftModel changes them. The positions after the invocation tokens are
# worked out in PeftModel's own forward (peft/tuners/lora/model.py, `_enable_peft_forward_hooks`), which is not there.
# Exits with 1 once that is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$folder"
./venv/bin/python - <<'PY'
import sys
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=128
)
transformers.LlamaForCausalLM(config).save_pretrained("base")


def base():
    return transformers.LlamaForCausalLM.from_pretrained("base")


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[1, 2, 5, 6, 7, 8]])).logits


setting = peft.LoraConfig(
    r=4, init_lora_weights=False, alora_invocation_tokens=[5, 6], target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)
peft.get_peft_model(base(), setting).save_pretrained("adapter")
plain = logits(base())
wrapped = logits(peft.PeftModel.from_pretrained(base(), "adapter"))
attached = base()
attached.load_adapter("adapter")
integrated = logits(attached)
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
print(f"PeftModel.from_pretrained moves the logits by {float((wrapped - plain).norm()):.3f}")
print(f"load_adapter, active {attached.active_adapters()}, moves them by {float((integrated - plain).norm()):.3f}")
sys.exit(not (torch.equal(integrated, plain) and not torch.allclose(wrapped, plain)))
PY
