"""One more generation after all figures: a padded batch and a decoded step, with each layer's output.

A first forward without padding is the same where the attention mask is ignored, or where positions are shifted: rotary
embeddings are relative. The decoded token is given, not chosen, so that a near tie changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from pytest_llmload.core.spec import Workload
from pytest_llmload.worker.model.generation import (
    generation_config_set,
    input_ids,
    no_single_tokens,
    settings,
    workload_tokens,
)
from pytest_llmload.worker.model.inputs import forward_inputs, generate_inputs, generating_module, vocabulary
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.logits_processor import LogitsProcessor
from pytest_llmload.worker.model.padded_run import ROWS, PaddedRun
from pytest_llmload.worker.model.tensors import local_part

#: Tokens of the prompt at most.
_PROMPT = 32
#: The step that is decoded after the prefill.
_STEPS = 2
_LAYER = re.compile(r"^(?:[^\d.]+\.)*\d+$")


def run(loaded: Loaded) -> PaddedRun:
    """Generate one given token after a padded batch; of a model that does not generate, run its forward."""
    found = PaddedRun()
    with _layers(loaded, found):
        _run(loaded, found)
    return found


def repeat(loaded: Loaded) -> PaddedRun:
    """Run the padded batch once more, without looking at the layers."""
    found = PaddedRun()
    _run(loaded, found)
    return found


def _run(loaded: Loaded, found: PaddedRun) -> None:
    length = max(2, min(loaded.job.spec.workload.prompt_tokens, _PROMPT))
    ids = input_ids(loaded, workload_tokens(Workload(ROWS, length, 1), vocabulary(loaded)))
    mask = torch.ones_like(ids)
    mask[-1, : length // 2] = 0
    generates = not no_single_tokens(loaded) and getattr(loaded.model, "generation_config", None) is not None
    with torch.no_grad():
        if generates:
            _generate(loaded, ids, mask, found)
        else:
            output = loaded.outermost(**forward_inputs(loaded, ids, mask))
            logits = getattr(output, "logits", None)
            logits = output[0] if logits is None else logits
            found.logits = [(logits[:, -1] if logits.dim() == 3 else logits).float().cpu()]


def _generate(loaded: Loaded, ids: Any, mask: Any, found: PaddedRun) -> None:
    config = settings(loaded, _STEPS)
    config.return_dict_in_generate = config.output_logits = True
    given = int(ids[0, 0])

    def force(logits: Any) -> Any:
        forced = torch.full_like(logits, -torch.inf)
        forced[:, given] = 0
        return forced

    with generation_config_set(loaded.model, config):
        inputs = generate_inputs(loaded, ids, mask, _STEPS)
        output = loaded.model.generate(**inputs, generation_config=config, logits_processor=[LogitsProcessor(force)])
    found.generated = True
    found.logits = [step.float().cpu() for step in output.logits]
    found.cache = getattr(output, "past_key_values", None)
    # An image takes places of its own; the token of the last step was not run.
    found.tokens = inputs.get("input_ids", ids).shape[1] + _STEPS - 1


@contextmanager
def _layers(loaded: Loaded, found: PaddedRun) -> Iterator[None]:
    """Look at the outputs of the outermost numbered modules during their first call."""
    handles = []
    if loaded.wrapper is None and not any(vars(m).get("_compiled_call_impl") for m in loaded.model.modules()):
        paths = [path for path, _ in generating_module(loaded.model).named_modules() if _LAYER.match(path)]
        modules = dict(generating_module(loaded.model).named_modules())
        handles = [modules[path].register_forward_hook(_look(path, found)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def _signs(size: int) -> Any:
    """Return so many signs, the same in every load."""
    return 1 - 2 * (torch.arange(size) * 2654435761 % 4096 >= 2048).double()


def _look(path: str, found: PaddedRun) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if path in found.layers or not isinstance(first, torch.Tensor) or first.dim() < 2:
            return
        values = local_part(first.detach()).flatten(0, -2)[: first.shape[-2]][-1].double().cpu()
        found.layers[path] = [float(values.norm()), float(values @ _signs(values.numel()))]

    return hook
