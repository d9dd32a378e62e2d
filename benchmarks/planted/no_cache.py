"""The key-value cache switched off: every token recomputes all before it."""

from __future__ import annotations

from typing import Any

import transformers

_generate = transformers.LlamaForCausalLM.generate


def _without_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _generate(self, *args, use_cache=False, **kwargs)


transformers.LlamaForCausalLM.generate = _without_cache
