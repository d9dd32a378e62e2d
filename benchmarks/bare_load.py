"""A script as a user would write it: load a checkpoint with transformers, print what torch's allocator says.

    python benchmarks/bare_load.py DIRECTORY '{"quant": "nf4", "double_quant": true}'

Nothing of the plugin is imported. After the load it runs a forward and generates the workload (``"workload":
"1x128+32"``). The last line is JSON: bytes and counts of the first GPU.
"""

import gc
import json
import re
import sys
import time
from typing import Any

import torch
import transformers


def main(path: str, options: dict[str, Any]) -> None:
    kwargs = {"device_map": {"": 0}, "dtype": "auto"}
    if options.get("dtype"):
        kwargs["dtype"] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options["dtype"]]
    quant = options.get("quant", "none")
    if quant == "int8":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif quant != "none":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant,
            bnb_4bit_use_double_quant=options.get("double_quant", False),
        )
    torch.empty(1, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    gc.collect()
    after = torch.cuda.memory_stats()
    figures = {
        "gpu.settled": torch.cuda.memory_allocated(),
        "gpu.load_peak": torch.cuda.max_memory_allocated(),
        "gpu.load_allocated": after["requested_bytes.all.allocated"] - before["requested_bytes.all.allocated"],
        "gpu.load_allocations": after["allocation.all.allocated"] - before["allocation.all.allocated"],
        "load": seconds,
    }
    batch, prompt, tokens = (int(part) for part in re.split("[x+]", options.get("workload", "1x128+32")))
    ids = torch.arange(batch * prompt, device="cuda").remainder(model.config.vocab_size).view(batch, prompt)
    with torch.no_grad():
        model(ids[:1])
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    torch.cuda.synchronize()
    figures["gpu.generate_peak"] = torch.cuda.max_memory_allocated()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
