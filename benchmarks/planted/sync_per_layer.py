"""A synchronisation after every layer."""

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

_forward = LlamaDecoderLayer.forward


def _then_wait(self, *args, **kwargs):
    result = _forward(self, *args, **kwargs)
    torch.cuda.synchronize()
    return result


LlamaDecoderLayer.forward = _then_wait
