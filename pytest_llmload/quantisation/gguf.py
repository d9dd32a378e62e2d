"""GGUF: files that transformers reads and makes dense."""

from __future__ import annotations

from pytest_llmload.quantisation.base import Method


class Gguf(Method):
    """Files of llama.cpp, which transformers dequantises while it loads them."""

    name = "gguf"
    summary = "Files of llama.cpp; transformers makes them dense while loading."
    packages = ("gguf",)
    imports = ("gguf",)
    file_methods = ("gguf",)
    phases = (
        ("gguf.quants", (), "convert"),
        ("transformers.modeling_gguf_pytorch_utils", ("process",), "convert"),
        ("gguf.gguf_reader", (), "read"),
        ("transformers.modeling_gguf_pytorch_utils", ("load_gguf_checkpoint",), "read"),
    )
    runs_on = "CPU, GPU: dense"
    held_as = "dense, in the dtype of the load"
    proved = "dense values are those that transformers dequantises; a note gives the types and bytes of the file"
