#!/usr/bin/env bash
# A LoRA of Unlimited-OCR's language model is lost when PEFT, or transformers, loads what PEFT has saved.
#
# A good guess: what save_pretrained() writes, PeftModel.from_pretrained() and load_adapter() read.
# Seen: both rename an adapter's tensors as transformers renames those of the model's checkpoints
# (transformers/conversion_mapping.py, "unlimited_ocr": `(^|model\.)layers\.` to `\1language_model.layers.`). PEFT saves
# the names of the live model, which have `language_model` already: they get it twice, no layer has such a name, and all
# factors keep their initial values. A warning about missing keys is all that says so; the adapter does nothing.
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
sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
shape = transformers.AutoConfig.for_model(
    "unlimited_ocr",
    text_config={
        **sizes, "intermediate_size": 128, "moe_intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 128,
        "n_routed_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    image_token_id=3,
)  # fmt: skip
for part in vars(shape.vision_config).values():
    if hasattr(part, "num_hidden_layers"):
        part.num_hidden_layers = 1
transformers.UnlimitedOcrForConditionalGeneration(shape).save_pretrained("base")


def base():
    return transformers.UnlimitedOcrForConditionalGeneration.from_pretrained("base")


def size(model):
    return sum(float(value.abs().sum()) for name, value in model.named_parameters() if "lora_B" in name)


setting = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj")
model = peft.get_peft_model(base(), setting)
with torch.no_grad():
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.fill_(1)
model.save_pretrained("adapter")
again, other = peft.PeftModel.from_pretrained(base(), "adapter"), base()
other.load_adapter("adapter")
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
print(f"sum of |B| as saved {size(model):.2f}; PeftModel.from_pretrained {size(again):.2f}; load_adapter {size(other):.2f}")
sys.exit(not (size(model) > 0 and size(again) == 0 and size(other) == 0))
PY
