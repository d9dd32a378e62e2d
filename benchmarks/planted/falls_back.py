"""Attention falls back to eager."""

import transformers

_load = transformers.LlamaForCausalLM.from_pretrained.__func__


def _eager(cls, *args, **kwargs):
    return _load(cls, *args, **{**kwargs, "attn_implementation": "eager"})


transformers.LlamaForCausalLM.from_pretrained = classmethod(_eager)
