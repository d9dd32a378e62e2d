"""A transient of the first forward, so many bytes above its highest moment as an environment variable says."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from pytest_llmload.system.proc import status

_MORE = int(os.environ["LLMLOAD_PLANTED_BYTES"])
_forward = transformers.LlamaForCausalLM.forward


def _with_a_transient(self: Any, *args: Any, **kwargs: Any) -> Any:
    given = _forward(self, *args, **kwargs)
    transformers.LlamaForCausalLM.forward = _forward
    now = status()
    torch.ones(now["VmHWM"] - now["VmRSS"] + _MORE, dtype=torch.uint8)
    return given


transformers.LlamaForCausalLM.forward = _with_a_transient
