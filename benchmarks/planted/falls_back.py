"""Attention falls back to eager."""

from __future__ import annotations

from typing import Any

import transformers

_load = transformers.LlamaForCausalLM.from_pretrained.__func__


def _eager(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return _load(cls, *args, **{**kwargs, "attn_implementation": "eager"})


transformers.LlamaForCausalLM.from_pretrained = classmethod(_eager)
