#!/usr/bin/env bash
# accelerate's offload in transformers: DBRX and JetMoe load with their last layer on disk, and their first forward
# raises. accelerate loads the weights of a module for that module's own forward, and drops them after it; the experts
# of DBRX read w1, v1 and w2 of a child module, JetMoe's mixture of attention calls methods of a module whose forward it
# never runs.
# A good guess: every model of transformers runs with a device_map that keeps each of its _no_split_modules whole.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
venv/bin/python - <<'PYTHON' 2> log || { cat log; exit 1; }
import accelerate, torch, transformers

sizes = {"vocab_size": 512, "max_position_embeddings": 128}
rope = {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}
configs = {
    "llama": transformers.LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                      num_attention_heads=4, **sizes),
    "dbrx": transformers.DbrxConfig(d_model=128, n_heads=4, n_layers=2, vocab_size=512, max_seq_len=128,
                                    attn_config=rope, ffn_config={"ffn_hidden_size": 256, "moe_num_experts": 4}),
    "jetmoe": transformers.JetMoeConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                                        num_key_value_heads=2, kv_channels=32, num_local_experts=4, **sizes),
}
ended = {}
for name, config in configs.items():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(name)
    classes = model._no_split_modules
    blocks = [path for path, module in model.named_modules() if type(module).__name__ in classes]
    places = {path: "cpu" for path, module in model.named_modules() if not any(module.children())}
    places = {path: place for path, place in places.items() if not any(path.startswith(f"{block}.") for block in blocks)}
    places |= {block: "cpu" for block in blocks[:-1]} | {blocks[-1]: "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(name, device_map=places, offload_folder=f"{name}-disk")
    try:
        with torch.no_grad():
            model(torch.arange(8)[None])
        ended[name] = "runs"
    except Exception as error:
        ended[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}")
for name, text in ended.items():
    print(f"{name} with its last layer on disk: {text}")
assert ended["llama"] == "runs", "offload does not work here at all"
assert "meta" in ended["dbrx"] and "meta" in ended["jetmoe"], "they run now"
PYTHON
