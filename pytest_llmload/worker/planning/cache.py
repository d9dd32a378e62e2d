"""The bytes of a generation cache, layer by layer: what grows with each token, and what does not.

The kinds are those of transformers' ``cache_utils.py``. A latent layer (DeepSeek's multi-head latent attention) is
counted as the installed release keeps it: compressed, or decompressed with as many heads as it has queries, which the
first releases of transformers 5 did.
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

FULL, GROUPED, SLIDING, LATENT, LINEAR, UNKNOWN = "full", "grouped", "sliding", "latent", "linear", "unknown"
_WINDOWED = ("sliding_attention", "chunked_attention")
_FP32 = 4


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of a sequence."""

    kind: str
    #: Elements for each token.
    per_token: int = 0
    #: Tokens after which it stops to grow; 0: never.
    window: int = 0
    #: Bytes for each sequence, however long it is.
    constant: int = 0

    def bytes(self, tokens: int, itemsize: int) -> int:
        """Return the bytes for one sequence of ``tokens``."""
        return self.per_token * itemsize * (min(tokens, self.window) if self.window else tokens) + self.constant


@dataclass(frozen=True)
class Cache:
    """A model's generation cache."""

    layers: tuple[CacheLayer, ...]
    itemsize: int

    def bytes(self, batch: int, tokens: int) -> int:
        """Return the bytes for ``batch`` sequences of ``tokens``."""
        return batch * sum(layer.bytes(tokens, self.itemsize) for layer in self.layers)

    @property
    def kinds(self) -> dict[str, int]:
        """Return the number of layers of each kind."""
        return dict(Counter(layer.kind for layer in self.layers))


def cache_of(config: Any, itemsize: int) -> Cache:
    """Return the cache of a model with this transformers config, for elements of ``itemsize`` bytes."""
    text = config.get_text_config(decoder=True)
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None] * count
    decompressed = bool(getattr(text, "kv_lora_rank", None)) and _decompresses(text)
    return Cache(tuple(_layer(text, kind, itemsize, decompressed) for kind in kinds[:count]), itemsize)


def _layer(text: Any, kind: str | None, itemsize: int, decompressed: bool) -> CacheLayer:
    heads = text.num_attention_heads
    if kind == "linear_attention":
        return _linear(text, itemsize)
    if kind not in (None, "full_attention", "attention", *_WINDOWED):
        return CacheLayer(UNKNOWN)
    if getattr(text, "kv_lora_rank", None):
        if not decompressed:
            return CacheLayer(LATENT, text.kv_lora_rank + text.qk_rope_head_dim)
        key = text.qk_nope_head_dim + text.qk_rope_head_dim
        return CacheLayer(LATENT, heads * (key + text.v_head_dim))
    groups = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", False):
        groups = 1
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    per_token = 2 * groups * size
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if window and (kind in _WINDOWED or (kind is None and getattr(text, "use_sliding_window", True))):
        # The layer keeps the window without the token that comes next.
        return CacheLayer(SLIDING, per_token, window - 1)
    return CacheLayer(GROUPED if groups < heads else FULL, per_token)


def _decompresses(text: Any) -> bool:
    """Return True if the installed modeling code of a latent architecture keeps keys and values of every head."""
    import transformers

    model = transformers.AutoModelForCausalLM._model_mapping.get(type(text), None)
    module = inspect.getmodule(model) if model is not None else None
    return module is not None and "past_key_values.update(key_states" in inspect.getsource(module)


def _linear(text: Any, itemsize: int) -> CacheLayer:
    """Return the layer of gated delta nets (Qwen3-Next, Qwen3.5).

    It keeps a convolution's last inputs and a recurrent state for each head.
    """
    names = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
    if not all(hasattr(text, name) for name in (*names, "linear_conv_kernel_dim")):
        return CacheLayer(UNKNOWN)
    key_heads, key, value_heads, value = (getattr(text, name) for name in names)
    convolved = 2 * key_heads * key + value_heads * value
    state = value_heads * key * value
    return CacheLayer(LINEAR, constant=convolved * text.linear_conv_kernel_dim * itemsize + state * _FP32)
