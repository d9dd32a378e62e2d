"""A synchronisation after every layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

_forward = LlamaDecoderLayer.forward


def _then_wait(self: Any, *args: Any, **kwargs: Any) -> Any:
    result = _forward(self, *args, **kwargs)
    torch.cuda.synchronize()
    return result


LlamaDecoderLayer.forward = _then_wait
