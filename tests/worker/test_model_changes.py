"""A load that a test changed is told from one that it only used."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from loads import load

from pytest_llmload.process.model_changes import fingerprint
from pytest_llmload.process.session import Session


class _Deaf:
    def send(self, message: Any) -> None:
        """No process listens."""


def ran(loaded: Any, function: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """The reply of a session that has a load to a test's ``llm.run(function)``."""
    session = Session(_Deaf())  # type: ignore[arg-type]
    session.loaded = loaded
    session._fingerprint = fingerprint(loaded.model)
    payload = base64.b64encode(cloudpickle.dumps((function, (), {}))).decode()
    reply = session.do_run({"kind": "run", "payload": payload})
    assert reply["kind"] == "value", reply
    return reply


def _generate(model: Any, tokenizer: Any) -> list[int]:
    ids = torch.tensor([[70, 71, 72]])
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    return list(map(int, generated[0]))


def _forward(model: Any, tokenizer: Any) -> int:
    return len(tokenizer("Hello")["input_ids"]) * int(model(torch.tensor([[70, 71]])).logits.shape[1])


def _zero(model: Any, tokenizer: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.zero_()


def _scale(model: Any, tokenizer: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2)


def _buffer(model: Any, tokenizer: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(1.5)


def _train(model: Any, tokenizer: Any) -> None:
    parameter = model.lm_head.weight
    parameter.requires_grad_(not parameter.requires_grad)


def _config(model: Any, tokenizer: Any) -> None:
    model.config.rms_norm_eps = 0.5


def _attention(model: Any, tokenizer: Any) -> None:
    model.config._attn_implementation = "eager"


def _generation(model: Any, tokenizer: Any) -> None:
    model.generation_config.repetition_penalty = 3.0


def _function(model: Any, tokenizer: Any) -> None:
    layer = model.model.layers[0]
    layer.forward = lambda hidden, *args, **kwargs: hidden


def _tokens(model: Any, tokenizer: Any) -> int:
    return int(tokenizer.add_tokens(["<a-new-one>"]))


def _dtype(model: Any, tokenizer: Any) -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def default_dtype() -> Any:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(
    "edit",
    [_zero, _scale, _buffer, _train, _config, _attention, _generation, _function, _tokens, _dtype],
)
def test_an_edit_is_seen(edit: Callable[[Any, Any], Any]) -> None:
    assert ran(load("tiny-llama", measure=False)[1], edit)["changed"]


@pytest.mark.parametrize("fields", [{}, {"quant": "int8"}, {"adapter": "random"}, {"strategy": "offload"}])
@pytest.mark.parametrize("use", [_generate, _forward])
def test_use_is_no_edit(fields: dict[str, Any], use: Callable[[Any, Any], Any]) -> None:
    assert not ran(load("tiny-llama", **fields)[1], use)["changed"]


def test_a_wrapper_that_generates_for_the_first_time_is_no_edit() -> None:
    assert not ran(load("tiny-llama", adapter="random", measure=False)[1], _generate)["changed"]
