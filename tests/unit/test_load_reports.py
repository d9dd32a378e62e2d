"""What transformers logs of a load that failed."""

from __future__ import annotations

from pytest_llmload.process.library_warnings import mismatches

# As transformers 5.23 writes it.
REPORT = """transformers: LlamaForCausalLM LOAD REPORT from: /models/m
Key                                 | Status   |
------------------------------------+----------+----------------------------------------------------------------------
model.layers.0.mlp.gate_proj.weight | MISMATCH | Reinit due to size mismatch - ckpt: torch.Size([512, 1024]) vs model:torch.Size([1024, 512])
model.layers.1.mlp.up_proj.weight   | MISSING  |

Notes:
- MISMATCH:\tckpt weights were loaded, but they did not match the original empty weight shapes."""  # noqa: E501


def test_tensors_of_another_shape_are_named() -> None:
    assert mismatches(["accelerate: something else", REPORT]) == [
        "model.layers.0.mlp.gate_proj.weight is [512, 1024] in the checkpoint and [1024, 512] in the model"
    ]
    assert mismatches([]) == []
