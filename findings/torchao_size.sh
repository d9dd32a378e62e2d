#!/usr/bin/env bash
# torchao: the size that a quantised weight reports is that of the dense weight, by every ordinary way of asking.
# A good guess: numel() * element_size(), untyped_storage().nbytes() or data_ptr() describe what a parameter holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torchao==0.18.0 numpy==2.4.6
venv/bin/python - <<'PYTHON'
import torch, torchao
from torchao.quantization import Int8WeightOnlyConfig, quantize_

layer = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
quantize_(layer, Int8WeightOnlyConfig())
weight = layer[0].weight
names, _ = weight.__tensor_flatten__()
held = sum(getattr(weight, name).untyped_storage().nbytes() for name in names)
reported = weight.numel() * weight.element_size()
storage = weight.untyped_storage().nbytes()
print(f"torchao {torchao.__version__}, torch {torch.__version__}: Linear(256, 256) in int8, {type(weight).__name__}")
print(f"numel() * element_size(): {reported}  untyped_storage().nbytes(): {storage}  data_ptr(): {weight.data_ptr()}")
print(f"bytes of the tensors inside ({', '.join(names)}): {held}")
assert reported == storage == 2 * 256 * 256, "the reported size is not that of bfloat16 any more"
assert weight.data_ptr() == 0, "data_ptr() is not 0 any more"
assert 256 * 256 <= held < 256 * 256 * 1.1
PYTHON
