"""Predict one load with the installed libraries, and print its figures and the lines that make its peak.

    python benchmarks/predict_one.py qwen2-7b quant=nf4

Run in one environment for each version of a library, it tells what an upgrade does to memory; no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import predict_gpu
from predict_baselines import predicted

from pytest_llmload.core.units import format_bytes
from pytest_llmload.prediction.devices import PREDICTED

QWEN2 = {
    **predict_gpu.SHAPES["qwen3-2b"],
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset, qwen2-7b, or a shape of predict_gpu.py")
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help="of the spec, as in quant=nf4")
    parser.add_argument("--workload", default="1x128+32")
    parser.add_argument("--cache-dir", type=Path, default=Path(tempfile.gettempdir()) / "predict-baselines")
    options = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    predict_gpu.SHAPES["qwen2-7b"] = QWEN2
    fields = dict(field.split("=", 1) for field in options.fields)
    result = predicted(options.model, fields, options.workload, options.cache_dir)
    print({name: result.environment.get(name) for name in ("torch", "transformers", "accelerate", "bitsandbytes")})
    for name in PREDICTED:
        value = result.metrics.get(name)
        text = result.unavailable.get(name, "") if value is None else f"{value:,.0f}"
        size = "" if value is None or name == "gpu.load_allocations" else f"  {format_bytes(value)}"
        print(f"{name:22} {text:>16}{size}")
    for operator, line, _, count, at_peak in sorted(result.sites.get("load", []), key=lambda row: -row[4])[:5]:
        print(f"  {format_bytes(at_peak):>10} at the load's peak, {count} allocations: {operator} at {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
