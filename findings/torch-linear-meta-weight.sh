#!/usr/bin/env bash
# torch: linear of a CPU tensor and a weight on the meta device returns memory as it was found, where other operators
# raise. LongCat-Flash, offloaded through accelerate, therefore runs and gives other logits at each call: its router
# reads the weight of a child module, which accelerate loads for the child's own forward only.
# A good guess: a weight that is not there raises ("Cannot copy out of meta tensor"), so what runs is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
venv/bin/python - <<'PYTHON' 2> log || { cat log; exit 1; }
import accelerate, torch, transformers

result = torch.nn.functional.linear(torch.ones(2, 4), torch.empty(3, 4, device="meta"))
print(f"torch {torch.__version__}: linear of a CPU tensor and a meta weight gives a tensor on {result.device}")
assert result.device.type == "cpu", "it is not silent any more"

config = transformers.LongcatFlashConfig(
    hidden_size=128, ffn_hidden_size=256, expert_ffn_hidden_size=64, num_layers=2, num_attention_heads=4,
    kv_lora_rank=64, q_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, qk_head_dim=64, head_dim=32,
    n_routed_experts=4, zero_expert_num=2, moe_topk=2, vocab_size=512, max_position_embeddings=512)
torch.manual_seed(0)
transformers.LongcatFlashForCausalLM(config).save_pretrained("model")
ids = torch.arange(16)[None]
logits = []
for place in ("cpu", "disk"):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
              "model.layers.0": "cpu", "model.layers.1": place}
    model = transformers.LongcatFlashForCausalLM.from_pretrained("model", device_map=places, offload_folder="disk")
    with torch.no_grad():
        logits.append(model(ids).logits)
wrong = not torch.allclose(*logits, rtol=1e-3, atol=1e-3)
print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}: LongCat-Flash with its last layer "
      f"on disk gives {'other' if wrong else 'the same'} logits, without an error")
assert wrong, "the logits are right now"
PYTHON
