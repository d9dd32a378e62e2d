#!/usr/bin/env bash
# torchao: IntxWeightOnlyConfig(weight_dtype=torch.int4) holds one byte a value, as much as int8.
# A good guess: weights in int4 take half a byte each.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 torchao==0.18.0 numpy==2.4.6
venv/bin/python - <<'PYTHON'
import torch, torchao
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

layer = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16))
quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))
weight = layer[0].weight
values = weight.qdata
print(f"torchao {torchao.__version__}: {type(weight).__name__}, target dtype {weight.target_dtype}")
print(f"{weight.numel()} values in {values.untyped_storage().nbytes()} bytes ({values.dtype}), "
      f"from {int(values.min())} to {int(values.max())}")
assert weight.target_dtype == torch.int4
assert -8 <= int(values.min()) and int(values.max()) <= 7
assert values.untyped_storage().nbytes() == weight.numel(), "the values are packed now"
PYTHON
