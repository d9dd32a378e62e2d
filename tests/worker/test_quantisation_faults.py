"""Faults planted in the quantisation: each is caught, and the message names what is wrong and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loads import SMALL, checkpoint, judged, load, quick
from planted_faults import Tamper, fused_experts, only_problem, the_problem

from pytest_llmload.core.job import Checkpoint


def test_quantisation_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.integrations, "replace_with_bnb_linear", lambda model, *args, **kwargs: model)
    problem = only_problem(judged(SMALL, quant="nf4"), "quantised")
    assert "nothing was quantised to nf4" in problem.message
    assert any(name.startswith("model.layers.0.mlp.up_proj.weight (") for name in problem.names)


def _linear4bit(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    import bitsandbytes

    original = bitsandbytes.nn.Linear4bit.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, **changes})

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "__init__", init)


def test_nf4_that_became_fp4(monkeypatch: pytest.MonkeyPatch) -> None:
    _linear4bit(monkeypatch, quant_type="fp4")
    assert "nf4 was requested, but fp4 is stored" in only_problem(judged(SMALL, quant="nf4"), "quantised").message


def test_fp4_bytes_that_are_called_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    original = functional.quantize_4bit

    def mislabelled(A: Any, *args: Any, **kwargs: Any) -> Any:
        packed, state = original(A, *args, **{**kwargs, "quant_type": "fp4"})
        named, _ = original(A, *args, **{**kwargs, "quant_type": "nf4"})
        state.quant_type, state.code = "nf4", functional.get_4bit_type("nf4", device=named.device)
        return packed, state

    monkeypatch.setattr(functional, "quantize_4bit", mislabelled)
    problem = only_problem(judged(SMALL, quant="nf4"), "quantised")
    assert "is not the checkpoint's" in problem.message


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_codes_of_one_type_that_the_state_calls_the_other(
    monkeypatch: pytest.MonkeyPatch, double_quant: bool, scheme: str
) -> None:
    import bitsandbytes.functional as functional

    original = functional.quantize_4bit

    def mislabelled(A: Any, *args: Any, **kwargs: Any) -> Any:
        packed, state = original(A, *args, **{**kwargs, "quant_type": "fp4"})
        state.quant_type = "nf4"
        return packed, state

    monkeypatch.setattr(functional, "quantize_4bit", mislabelled)
    result = quick(SMALL, quant=scheme, double_quant=double_quant)
    messages = [problem.message for problem in result.problems if problem.check == "quantised"]
    wanted = "nf4 was requested, but fp4 is stored" if scheme == "nf4" else "fp4 is stored, but its state calls it nf4"
    assert any(wanted in message for message in messages)
    assert {row.quant.partition(" ")[0] for row in result.manifest if row.cls == "Linear4bit"} == {"fp4"}


def test_double_quant_that_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    _linear4bit(monkeypatch, compress_statistics=False)
    problem = only_problem(judged(SMALL, quant="nf4", double_quant=True), "quantised")
    assert "double quant was requested, but the statistics are plain float32" in problem.message


def test_double_quant_that_was_not_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    _linear4bit(monkeypatch, compress_statistics=True)
    problem = only_problem(judged(SMALL, quant="nf4"), "quantised")
    assert "double quant was not requested" in problem.message


def test_a_users_own_loader_may_do_more_than_the_markers_ask() -> None:
    result = quick(SMALL, strategy="loader", target="loads:double_quant_loader", quant="nf4")
    assert result.problems == []
    assert any("nested" in row.quant for row in result.manifest)
    problem = only_problem(
        quick(SMALL, strategy="loader", target="loads:double_quant_loader", quant="int8"), "quantised"
    )
    assert "int8 was requested, but nf4 is stored" in problem.message


def test_another_compute_dtype(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.compute_dtype = torch.float32

    tampered(tamper)
    problem = only_problem(judged(SMALL, quant="nf4", compute_dtype="bf16"), "quantised")
    assert "compute dtype bfloat16 was requested, but float32 is set" in problem.message
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_one_layer_left_dense(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    from transformers.quantizers.base import HfQuantizer

    original = HfQuantizer.get_modules_to_not_convert

    def one_more(*args: Any, **kwargs: Any) -> list[str]:
        return [*original(*args, **kwargs), "model.layers.1.mlp.up_proj"]

    monkeypatch.setattr(HfQuantizer, "get_modules_to_not_convert", staticmethod(one_more))
    problem = only_problem(judged(SMALL, quant=scheme), "quantised")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.up_proj.weight"]
    assert f"of the quantisable weights are {scheme}" in problem.message
    assert "left as Linear" in problem.message
    assert problem.bytes > 0


def test_a_quantised_module_whose_state_is_lost(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        module = model.model.layers[0].self_attn.o_proj
        module.weight = torch.nn.Parameter(torch.zeros(module.out_features, module.in_features), requires_grad=False)
        module.quant_state = None

    tampered(tamper)
    problem = the_problem(judged(SMALL, quant="nf4"), "quantised")
    assert "is a Linear4bit, but its weight is a plain float32 tensor without quantisation state" in problem.message


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_another_layers_quantised_values(tampered: Callable[[Tamper], None], scheme: str) -> None:
    def tamper(model: Any) -> None:
        layers = model.model.layers
        layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj

    tampered(tamper)
    problem = only_problem(judged(SMALL, quant=scheme), "quantised")
    assert "is not the checkpoint's" in problem.message
    assert len(problem.names) == 2


@fused_experts
def test_fused_experts_are_named_with_the_share() -> None:
    result, loaded = load("tiny-mixtral", quant="nf4")
    problem = the_problem(result, "quantised")
    assert "fused 3-D experts are parameters, not nn.Linear: bitsandbytes did not see them" in problem.message
    assert "only 11.1 % of the quantisable weights are nf4" in problem.message
    assert any("mlp.experts.gate_up_proj (" in name for name in problem.names)
    assert problem.bytes == sum(row.bytes for row in result.manifest if "experts" in row.module)
    assert type(loaded.model.lm_head) is torch.nn.Linear
    assert problem.hint == "if that is intended: quant('nf4', dense_ok=['*.mlp.experts.*'])"


@fused_experts
def test_dense_experts_may_be_allowed() -> None:
    result = quick("tiny-mixtral", quant="nf4", dense_ok=("*.experts.*",))
    assert result.problems == []
    assert [row.quant for row in result.manifest if row.module == "lm_head"] == [""]
    assert any("are dense as dense_ok says" in note for note in result.notes)


def test_skipped_modules_are_added_to_the_librarys_own() -> None:
    result = quick(SMALL, quant="nf4", skip_modules=("down_proj",))
    assert result.problems == []
    dense = {row.module for row in result.manifest if row.cls == "Linear"}
    assert dense == {"lm_head", "model.layers.*.mlp.down_proj"}


@fused_experts
def test_experts_that_the_library_quantised_itself_count(tampered: Callable[[Tamper], None]) -> None:
    """bitsandbytes' own way for fused parameters: no Params4bit, the state is in a parametrization."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    def tamper(model: Any) -> None:
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(layer.mlp.experts, name, quant_type="nf4")

    dense = quick("tiny-mixtral", quant="nf4")
    tampered(tamper)
    result = quick("tiny-mixtral", quant="nf4")
    assert [problem.message for problem in result.problems] == []
    assert result.metrics["host.weights"] < dense.metrics["host.weights"]
    assert any(row.quant.startswith("nf4") and "experts" in row.module for row in result.manifest)


@fused_experts
def test_the_values_of_experts_that_the_library_quantised_count_too(tampered: Callable[[Tamper], None]) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    def tamper(model: Any) -> None:
        experts = [layer.mlp.experts for layer in model.model.layers]
        experts[0].down_proj.data, experts[1].down_proj.data = experts[1].down_proj.data, experts[0].down_proj.data
        for module in experts:
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, name, quant_type="nf4")

    tampered(tamper)
    problem = only_problem(judged("tiny-mixtral", quant="nf4"), "quantised")
    assert "a dequantised block of 2 of" in problem.message
    assert all("down_proj" in name for name in problem.names)


@fused_experts
def test_one_quantised_expert_between_the_others(tampered: Callable[[Tamper], None]) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    def tamper(model: Any) -> None:
        experts = [layer.mlp.experts for layer in model.model.layers]
        experts[1].gate_up_proj.data[1].mul_(2)
        for module in experts:
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(module, name, quant_type="nf4")

    tampered(tamper)
    problem = only_problem(judged("tiny-mixtral", quant="nf4"), "quantised")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_stretch_of_quantised_values(tampered: Callable[[Tamper], None], scheme: str) -> None:
    def tamper(model: Any) -> None:
        packed = model.model.layers[1].mlp.up_proj.weight.data
        rows = packed.shape[0]
        packed[rows // 2 : rows - rows // 16] = 0

    tampered(tamper)
    assert "is not the checkpoint's" in only_problem(judged("tiny-llama", quant=scheme), "quantised").message


@fused_experts
def test_a_subclass_of_linear_is_named(tmp_path: Path) -> None:
    """transformers 5 replaces ``nn.Linear`` itself only, and says something about eetq."""
    config = transformers.FalconConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
    )
    transformers.FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    problem = only_problem(judged(Checkpoint(str(tmp_path), "shape", "weights"), quant="nf4"), "quantised")
    assert "nothing was quantised to nf4" in problem.message
    assert "FalconLinear is not nn.Linear itself" in problem.message


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_checkpoint_that_is_quantised_already(tmp_path: Path, scheme: str) -> None:
    from transformers import BitsAndBytesConfig

    setting = BitsAndBytesConfig(load_in_8bit=True)
    if scheme == "nf4":
        setting = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    source = checkpoint(SMALL).path
    made = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=setting, dtype="auto", device_map={"": "cpu"}
    )
    made.save_pretrained(tmp_path)
    files = Checkpoint(str(tmp_path), "shape", "weights")
    other = "int8" if scheme == "nf4" else "nf4"
    result = quick(files)
    assert result.problems == []
    assert any(row.quant.startswith(scheme) for row in result.manifest)
    assert quick(files, quant=scheme).problems == []
    assert (
        f"{other} was requested, but {scheme} is stored" in only_problem(quick(files, quant=other), "quantised").message
    )
