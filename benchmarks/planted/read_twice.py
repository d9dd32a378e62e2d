"""The load reads every weight twice."""

import transformers

_load = transformers.LlamaForCausalLM.from_pretrained.__func__


def _twice(cls, *args, **kwargs):
    _load(cls, *args, **kwargs)
    return _load(cls, *args, **kwargs)


transformers.LlamaForCausalLM.from_pretrained = classmethod(_twice)
