"""The modules that loading a model imports; a load's process imports them before it starts to measure."""

#: Modules that ``from_pretrained`` and ``generate`` import on their first call.
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
#: Modules that place weights by device maps, and on disk.
PLACEMENT = ("psutil", "numpy.ctypeslib", "resource")
