"""The load reads every weight twice."""

from __future__ import annotations

from typing import Any

import transformers

_load = transformers.LlamaForCausalLM.from_pretrained.__func__


def _twice(cls: Any, *args: Any, **kwargs: Any) -> Any:
    _load(cls, *args, **kwargs)
    return _load(cls, *args, **kwargs)


transformers.LlamaForCausalLM.from_pretrained = classmethod(_twice)
