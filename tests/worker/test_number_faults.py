"""Faults planted in what a model computes: each is caught, and the message names what is wrong and where."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loads import judged, quick
from planted_faults import Tamper, only_problem, without
from safetensors.torch import load_file, save_file

from pytest_llmload.core.spec import Workload

_KEPT: list[Any] = []


def test_a_second_copy_of_one_weight_is_counted_and_named(tampered: Callable[[Tamper], None]) -> None:
    clean = quick("tiny-llama")
    tampered(lambda model: _KEPT.append(model.model.layers[0].mlp.up_proj.weight.detach().clone()))
    try:
        result = quick("tiny-llama")
        size = _KEPT[0].nbytes
        shape = list(_KEPT[0].shape)
    finally:
        _KEPT.clear()
    assert clean.metrics["host.other_tensors"] == 0
    assert result.metrics["host.other_tensors"] == size
    (note,) = [note for note in result.notes if "not part of the model" in note]
    assert f"bfloat16{shape} on cpu" in note
    assert "_KEPT" in note


def test_a_copy_that_a_module_keeps_changes_its_manifest_row(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        module = model.model.layers[0].mlp.up_proj
        module.backup = module.weight.detach().clone()

    clean = quick("tiny-llama")
    tampered(tamper)
    result = quick("tiny-llama")
    changed = [row for row in result.manifest if row not in clean.manifest]
    assert {row.module for row in changed} == {"model.layers.*.mlp.up_proj"}
    assert result.metrics["host.weights"] > clean.metrics["host.weights"]


def test_wrong_rotary_frequencies_show_in_the_numbers(tampered: Callable[[Tamper], None]) -> None:
    clean = quick("tiny-llama")
    tampered(lambda model: model.model.rotary_emb.inv_freq.mul_(1.01))
    result = quick("tiny-llama")
    differing = {name for name, value in result.numbers.buffers.items() if value != clean.numbers.buffers[name]}
    assert differing == {"model.rotary_emb.inv_freq"}
    assert result.numbers.logits != clean.numbers.logits


def test_logits_that_are_not_finite(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    tampered(tamper)
    problem = only_problem(judged("tiny-llama"), "finite")
    assert "logits of the first forward are not finite" in problem.message


@pytest.mark.parametrize("fields", [{}, {"adapter": "random"}])
def test_logits_that_are_not_finite_after_the_prefill(tampered: Callable[[Tamper], None], fields: Any) -> None:
    def tamper(model: Any) -> None:
        def from_the_third(module: Any, inputs: Any, output: Any) -> Any:
            model.calls = 0 if output.shape[1] > 1 else getattr(model, "calls", 0) + 1
            return output * float("nan") if model.calls > 1 else output

        model.model.layers[1].mlp.register_forward_hook(from_the_third)

    tampered(tamper)
    problem = only_problem(judged("tiny-llama", **fields), "finite")
    assert "the logits of 1 of 3 generated tokens are not finite, from token 3 on (decoded" in problem.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_logit_that_is_not_finite_after_the_prefill(tampered: Callable[[Tamper], None], value: float) -> None:
    def tamper(model: Any) -> None:
        def remember(module: Any, inputs: Any, output: Any) -> None:
            model.decodes = inputs[0].shape[1] == 1

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            if model.decodes:
                output[..., 700] = value
            return output

        model.model.norm.register_forward_hook(remember)
        model.lm_head.register_forward_hook(spoil)

    tampered(tamper)
    problem = only_problem(judged("tiny-llama"), "finite")
    assert "the logits of 2 of 3 generated tokens are not finite, from token 2 on (decoded" in problem.message


def test_logits_that_are_not_finite_in_a_generations_prefill_only(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            # A generation asks for the logits of the last position only.
            return output * float("nan") if output.shape[1] == 1 else output

        model.lm_head.register_forward_hook(spoil)

    tampered(tamper)
    problem = only_problem(judged("tiny-llama"), "finite")
    assert "from token 1 on (the prefill's)" in problem.message


def test_a_weight_that_is_not_finite_where_no_token_looks(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.embed_tokens.weight.data
        weight[weight.shape[0] // 5, 5] = float("nan")
        weight[weight.shape[0] // 7, 7] = float("inf")

    tampered(tamper)
    problem = only_problem(judged("tiny-llama", dtype="fp16"), "finite")
    assert [name.split(" ")[0] for name in problem.names] == ["model.embed_tokens.weight"]
    assert "1 stored weight holds NaN or infinity" in problem.message


@pytest.mark.parametrize(
    "fields", [{"quant": "nf4"}, {"quant": "nf4", "double_quant": True}, {"quant": "int8"}], ids=["nf4", "dq", "int8"]
)
def test_statistics_that_are_not_finite(tampered: Callable[[Tamper], None], fields: Any) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.layers[1].mlp.up_proj.weight
        state = getattr(weight, "quant_state", None)
        scales = weight.SCB if state is None else state.absmax if state.state2 is None else state.state2.absmax
        scales[scales.numel() // 5] = float("inf")

    tampered(tamper)
    result = judged("tiny-llama", **fields, workload=Workload(1, 16, 1))
    (told,) = [problem for problem in result.problems if problem.message.endswith("NaN or infinity")]
    # Some CPUs' kernels undo the nesting in the first forward.
    assert re.match(r"model\.layers\.1\.mlp\.up_proj\.weight's (nested )?scales", told.names[0])


def test_what_the_checkpoint_itself_holds_is_noted(tmp_path: Path) -> None:
    files = without("tiny-llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 7] = float("-inf")
    save_file(tensors, file, {"format": "pt"})
    result = quick(files)
    assert result.problems == []
    assert "model.embed_tokens.weight is not finite, as the checkpoint has it" in result.notes


def test_a_sum_that_overflows_is_finite(tampered: Callable[[Tamper], None], tmp_path: Path) -> None:
    files = without("tiny-llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, :8] = 3e38
    save_file(tensors, file, {"format": "pt"})
    result = quick(files)
    assert result.problems == []
    assert not any("not finite" in note for note in result.notes)


def test_a_forward_that_raises_is_a_finding(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        def broken(module: Any, inputs: Any, output: Any) -> None:
            raise AssertionError("quant_state is required")

        model.model.layers[0].mlp.register_forward_hook(broken)

    tampered(tamper)
    result = quick("tiny-llama")
    message = only_problem(result, "forward").message
    assert re.search(r"AssertionError: quant_state is required \(worker/test_number_faults\.py:\d+\)$", message)
    assert result.metrics["host.weights"] > 0
    assert "host.settled" in result.metrics


def test_out_of_memory_is_not_a_finding_but_propagates(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        def broken(module: Any, inputs: Any, output: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        model.model.layers[0].mlp.register_forward_hook(broken)

    tampered(tamper)
    with pytest.raises(torch.OutOfMemoryError):
        quick("tiny-llama")
