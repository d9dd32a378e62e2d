#!/usr/bin/env bash
# compressed-tensors in transformers: a packed W4A16 checkpoint is packed after from_pretrained, and its first forward
# makes every layer dense for good.
# A good guess: a model that holds 4-bit weights when it is loaded serves from 4-bit weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0 accelerate==1.15.0 numpy==2.4.6
venv/bin/python - <<'PYTHON' 2> log || { cat log; exit 1; }
import json
from pathlib import Path

import compressed_tensors, torch, transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

config = transformers.LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, dtype="bfloat16"
)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("model")
file = Path("model/model.safetensors")
tensors = load_file(file)
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    weight = tensors.pop(name)
    groups = weight.float().reshape(weight.shape[0], -1, 64)
    scales = groups.abs().amax(dim=-1) / 7.5
    codes = (groups / scales[..., None]).round().clamp(-8, 7).reshape(weight.shape).to(torch.int8)
    tensors |= {
        f"{name}_packed": pack_to_int32(codes, 4),
        f"{name}_scale": scales.to(torch.bfloat16),
        f"{name}_shape": torch.tensor(weight.shape),
    }
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
written = Path("model/config.json")
written.write_text(json.dumps({**json.loads(written.read_text()), "quantization_config": {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"],
}}))

def held(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

model = transformers.AutoModelForCausalLM.from_pretrained("model")
before, layer = held(model), model.model.layers[0].mlp.up_proj
names = sorted(name for name, _ in layer.named_parameters())
model(torch.zeros(1, 8, dtype=torch.long))
after, dense = held(model), sorted(name for name, _ in layer.named_parameters())
print(f"transformers {transformers.__version__}, compressed-tensors {compressed_tensors.__version__}")
print(f"after from_pretrained: {before} bytes, up_proj has {names}")
print(f"after one forward:     {after} bytes, up_proj has {dense}, weight {layer.weight.dtype}")
assert "weight_packed" in names, "the checkpoint is not packed after the load any more"
assert "weight" in dense and layer.weight.dtype == torch.bfloat16 and after > 1.5 * before, "it stays packed now"
PYTHON
