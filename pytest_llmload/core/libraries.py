"""The modules that loading a model imports, so that nobody imports them while the clock runs."""

#: What ``from_pretrained`` and ``generate`` import on their first call.
LIBRARY = (
    "torch",
    "safetensors.torch",
    "accelerate",
    "transformers",
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.generation.utils",
    "transformers.integrations.accelerate",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
#: What device maps and weights on disk are made with.
PLACEMENT = ("psutil", "numpy.ctypeslib", "resource")
