"""Floating types by the names that markers take and by those that torch and checkpoints give them."""

#: Short name -> torch's.
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: torch's name -> the short one.
SHORT_NAMES = {name: short for short, name in TORCH_NAMES.items()}
