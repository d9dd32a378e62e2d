"""Faults planted in dense weights and their places: each is caught, and the message names what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loads import judged, quick
from planted_faults import Tamper, by_loader, fused_experts, only_problem, the_problem, without
from safetensors.torch import load_file, save_file

# Dense weights


def test_a_load_that_was_upcast(tampered: Callable[[Tamper], None]) -> None:
    tampered(lambda model: model.float())
    problem = only_problem(judged("tiny-llama", dtype="bf16"), "dtype")
    assert "bfloat16 was requested, but" in problem.message
    assert "are float32" in problem.message
    assert any(name.startswith("model.layers.0.self_attn.q_proj.weight") for name in problem.names)


def test_an_upcast_where_the_test_names_no_dtype(tampered: Callable[[Tamper], None]) -> None:
    tampered(lambda model: model.model.layers[2].mlp.down_proj.float())
    problem = the_problem(judged("tiny-llama"), "dtype")
    assert problem.names[0].startswith("model.layers.2.mlp.down_proj.weight")


def test_parameters_that_the_class_pins_are_told_not_blamed(
    tampered: Callable[[Tamper], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    result = quick("tiny-llama", dtype="bf16")
    assert [problem for problem in result.problems if problem.check == "dtype"] == []
    (note,) = [note for note in result.notes if "pins" in note]
    assert note.startswith("the model class pins 3 parameters to float32: model.layers.0.input_layernorm.weight")
    assert {row.dtype for row in result.manifest if row.module.endswith("input_layernorm")} == {"float32"}


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt-neox"])
def test_norms_that_were_initialised_again(tampered: Callable[[Tamper], None], model: str) -> None:
    def tamper(loaded: Any) -> None:
        for module in loaded.modules():
            if "Norm" in type(module).__name__:
                module.weight.data.fill_(1.0)

    tampered(tamper)
    problem = only_problem(judged(model), "values")
    assert "constant 1, as initialised and never loaded" in problem.message
    assert all("norm" in name for name in problem.names)


@fused_experts
@pytest.mark.parametrize("expert", [1, 2])
def test_one_expert_between_the_others(tampered: Callable[[Tamper], None], expert: int) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].mlp.experts.down_proj.data[expert].mul_(1.01)

    tampered(tamper)
    problem = only_problem(judged("tiny-mixtral"), "values")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.experts.down_proj"]


def test_values_that_differ_between_the_ends_and_the_middle(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight.data
            rows = weight.shape[0]
            weight[rows // 16 : rows * 7 // 16].mul_(1.01)
            weight[rows * 9 // 16 : rows * 15 // 16].mul_(1.01)

    tampered(tamper)
    assert len(only_problem(judged("tiny-llama"), "values").names) == 3


def test_values_that_differ(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.01)

    tampered(tamper)
    problem = only_problem(judged("tiny-qwen3"), "values")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.self_attn.k_proj.weight"]


@fused_experts
def test_fused_experts_that_were_joined_in_the_wrong_order(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.layers[1].mlp.experts.gate_up_proj.data
        weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))

    tampered(tamper)
    problem = only_problem(judged("tiny-mixtral"), "values")
    assert problem.names[0].startswith("model.layers.1.mlp.experts.gate_up_proj")


def test_a_missing_key(tmp_path: Path) -> None:
    files = without("tiny-llama", tmp_path, "model.layers.2.mlp.up_proj.weight")
    problem = only_problem(judged(files), "keys")
    assert problem.names == ("model.layers.2.mlp.up_proj.weight",)
    assert "not in the checkpoint" in problem.message


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_key_behind_a_users_own_loader(tmp_path: Path, name: str) -> None:
    problem = only_problem(by_loader(without("tiny-llama", tmp_path, name)), "keys")
    assert [told.split(" ")[0] for told in problem.names] == [name]
    assert "1 parameter of the model is not in the checkpoint" in problem.message


def test_a_checkpoint_under_other_names_is_noted(tmp_path: Path) -> None:
    """What a user's own loader calls them is not known: neither missing nor unused can be said of any."""
    files = without("tiny-llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({f"other.{name}.w": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    result = by_loader(files)
    assert result.problems == []
    assert any("there they may have other names" in note for note in result.notes)


def _fewer(model: Any) -> None:
    del model.model.layers[-1]


def test_a_layer_that_was_left_out(tampered: Callable[[Tamper], None]) -> None:
    tampered(_fewer)
    for result in (quick("tiny-llama"), quick("tiny-llama", quant="nf4"), by_loader("tiny-llama")):
        problem = only_problem(result, "keys")
        assert "are in the checkpoint, but not in the model" in problem.message
        assert len(problem.names) == 9
        assert all(name.startswith("model.layers.2.") for name in problem.names)
        assert "keys_ok=['model.layers.2.*']" in problem.hint
    assert quick("tiny-llama", options=(("keys_ok", '["model.layers.2.*"]'),)).problems == []


def test_a_bias_that_was_dropped(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.bias = None

    tampered(tamper)
    for scheme in ("none", "nf4"):
        problem = only_problem(judged("tiny-gpt-neox", quant=scheme), "keys")
        assert problem.names == ("gpt_neox.layers.1.mlp.dense_h_to_4h.bias",)


def test_a_layer_that_stands_in_for_another(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1] = model.model.layers[0]

    tampered(tamper)
    # With transformers 4 it does not run either: both write to one layer's cache.
    found = only_problem if int(transformers.__version__.partition(".")[0]) >= 5 else the_problem
    problem = found(judged("tiny-llama"), "values")
    assert all(name.startswith("model.layers.1.") for name in problem.names)


@pytest.mark.parametrize("said", [False, True])
def test_a_head_that_was_tied_to_the_embedding(tampered: Callable[[Tamper], None], said: bool) -> None:
    def tamper(model: Any) -> None:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = said

    tampered(tamper)
    result = judged("tiny-llama")
    problem = the_problem(result, "values")
    assert [name.split(" ")[0] for name in problem.names] == ["lm_head.weight"]
    changed = ["config"] if said else []
    assert [other.check for other in result.problems if other.check != "values"] == changed


def test_an_unexpected_key_and_its_permission(tmp_path: Path) -> None:
    files = without("tiny-llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({**load_file(file), "score.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    problem = only_problem(quick(files), "keys")
    assert problem.names == ("score.weight",)
    assert problem.hint == "if that is intended: strategy('single', keys_ok=['score.weight'])"
    assert quick(files, options=(("keys_ok", json.dumps(["score.*"])),)).problems == []


def test_tied_weights_that_were_duplicated(tmp_path: Path, tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())

    clean = quick("tiny-qwen3")
    tampered(tamper)
    result = quick("tiny-qwen3")
    problem = only_problem(result, "tied")
    assert set(problem.names) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert result.metrics["host.weights"] == clean.metrics["host.weights"] + problem.bytes


# Places


def test_a_layer_that_was_offloaded_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        parts = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
        device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.layers.1": "disk"}
        kwargs |= {"device_map": device_map, "offload_folder": str(tmp_path)}
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    problem = only_problem(judged("tiny-llama", strategy="auto"), "devices")
    assert "are offloaded to disk; the load was for cpu" in problem.message
    assert all(name.startswith("model.layers.1.") for name in problem.names)
    assert problem.bytes > 0


def test_a_layer_without_values(tampered: Callable[[Tamper], None]) -> None:
    tampered(lambda model: model.model.layers[1].mlp.to("meta"))
    result = judged("tiny-llama")
    assert "are left without values on meta" in the_problem(result, "devices").message


def test_a_plan_that_was_not_kept(tampered: Callable[[Tamper], None]) -> None:
    from accelerate.hooks import remove_hook_from_module

    tampered(lambda model: remove_hook_from_module(model, recurse=True))
    result = judged("tiny-llama", strategy="offload")
    assert "the plan says disk" in the_problem(result, "devices").message
    assert "nothing is offloaded" in the_problem(result, "offload").message


def test_another_attention(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.config._attn_implementation = "eager"

    assert quick("tiny-llama", attn="eager").problems == []
    tampered(tamper)
    problem = only_problem(quick("tiny-llama", attn="sdpa"), "attention")
    assert "attention sdpa was requested, but eager is used" in problem.message
