"""Models in a wrong mode, without a text to read, or at which a kernel fails: each is caught and named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loads import judged
from planted_faults import Tamper, by_loader, only_problem

from pytest_llmload.core.job import Checkpoint


@pytest.mark.parametrize(("share", "finding"), [(0.1, True), (0.0, False)])
def test_a_model_that_was_left_in_training_mode(
    tampered: Callable[[Tamper], None], share: float, finding: bool
) -> None:
    def tamper(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = share
        model.transformer.h[1].train()

    tampered(tamper)
    result = by_loader("tiny-gpt2")
    if finding:
        problem = only_problem(result, "mode")
        assert "transformer.h.1.attn.attn_dropout" in problem.names
        assert all(name.startswith("transformer.h.1.") for name in problem.names)
    else:
        assert result.problems == []
        assert any("in training mode" in note for note in result.notes)


def test_a_share_that_a_function_drops(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].self_attn.attention_dropout = 0.1
        model.train()

    tampered(tamper)
    assert only_problem(by_loader("tiny-llama"), "mode").names == ("model.layers.1.self_attn",)


def test_a_model_that_reads_no_text(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    problem = only_problem(judged(Checkpoint(str(tmp_path), "shape", "weights")), "forward")
    assert problem.message.startswith("ViTForImageClassification takes pixel_values and no token ids")


def test_an_odd_dimension_is_named_where_a_kernel_fails(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        import bitsandbytes

        def broken(module: Any, inputs: Any, output: Any) -> None:
            # Fails inside bitsandbytes, as its kernels do.
            bitsandbytes.functional.get_4bit_type("nf5", device="cpu")

        model.model.layers[0].mlp.up_proj.weight.quant_state.shape = torch.Size((100, 64))
        model.model.layers[0].mlp.register_forward_hook(broken)

    tampered(tamper)
    result = judged("tiny-llama", quant="nf4")
    (problem,) = [problem for problem in result.problems if problem.check == "forward"]
    assert re.search(r"\(bitsandbytes/[\w/]+\.py:\d+\)$", problem.message)
    assert "model.layers.0.mlp.up_proj.weight is 100 x 64" in problem.hint
