"""Planted faults: each is caught, and the message names what is wrong and where."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loads import checkpoint, load, quick
from safetensors.torch import load_file, save_file

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.results import LoadResult, Problem
from pytest_llmload.core.spec import Workload

Tamper = Callable[[Any], None]

fused_experts = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 keeps experts as a list of Linear"
)


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tamper], None]:
    """Makes every load hand its model to a function before a check sees it."""

    def plant(tamper: Tamper) -> None:
        original = transformers.PreTrainedModel.from_pretrained.__func__

        def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
            given = original(cls, *args, **kwargs)
            tamper(given[0] if isinstance(given, tuple) else given)
            return given

        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))

    return plant


def the_problem(result: LoadResult, check: str) -> Problem:
    assert result.outcome == "not_applied"
    found = [problem for problem in result.problems if problem.check == check]
    assert len(found) == 1, result.problems
    return found[0]


def only_problem(result: LoadResult, check: str) -> Problem:
    found = the_problem(result, check)
    assert result.problems == [found]
    return found


def by_loader(files: str | Checkpoint, **fields: Any) -> LoadResult:
    return quick(files, strategy="loader", target="loads:plain_loader", **fields)


# Quantisation


def test_quantisation_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.integrations, "replace_with_bnb_linear", lambda model, *args, **kwargs: model)
    problem = only_problem(quick("tiny-llama", quant="nf4"), "quantised")
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
    assert "nf4 was requested, but fp4 is stored" in only_problem(quick("tiny-llama", quant="nf4"), "quantised").message


def test_fp4_bytes_that_are_called_nf4(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    original = functional.quantize_4bit

    def mislabelled(A: Any, *args: Any, **kwargs: Any) -> Any:
        packed, state = original(A, *args, **{**kwargs, "quant_type": "fp4"})
        named, _ = original(A, *args, **{**kwargs, "quant_type": "nf4"})
        state.quant_type, state.code = "nf4", functional.get_4bit_type("nf4", device=named.device)
        return packed, state

    monkeypatch.setattr(functional, "quantize_4bit", mislabelled)
    problem = only_problem(quick("tiny-llama", quant="nf4"), "quantised")
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
    result = quick("tiny-llama", quant=scheme, double_quant=double_quant)
    messages = [problem.message for problem in result.problems if problem.check == "quantised"]
    wanted = "nf4 was requested, but fp4 is stored" if scheme == "nf4" else "fp4 is stored, but its state calls it nf4"
    assert any(wanted in message for message in messages)
    assert all(row.quant.startswith("fp4") for row in result.manifest if row.cls == "Linear4bit")


def test_double_quant_that_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    _linear4bit(monkeypatch, compress_statistics=False)
    problem = only_problem(quick("tiny-llama", quant="nf4", double_quant=True), "quantised")
    assert "double quant was requested, but the statistics are plain float32" in problem.message


def test_double_quant_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _linear4bit(monkeypatch, compress_statistics=True)
    problem = only_problem(quick("tiny-llama", quant="nf4"), "quantised")
    assert "double quant was not requested" in problem.message


def test_a_users_own_loader_may_do_more_than_the_markers_ask() -> None:
    result = quick("tiny-llama", strategy="loader", target="loads:double_quant_loader", quant="nf4")
    assert result.problems == []
    assert any("nested" in row.quant for row in result.manifest)
    problem = only_problem(
        quick("tiny-llama", strategy="loader", target="loads:double_quant_loader", quant="int8"), "quantised"
    )
    assert "int8 was requested, but nf4 is stored" in problem.message


def test_another_compute_dtype(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.compute_dtype = torch.float32

    tampered(tamper)
    problem = only_problem(quick("tiny-llama", quant="nf4", compute_dtype="bf16"), "quantised")
    assert "compute dtype bfloat16 was requested, but float32 is set" in problem.message
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_one_layer_left_dense(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    from transformers.quantizers.base import HfQuantizer

    original = HfQuantizer.get_modules_to_not_convert

    def one_more(*args: Any, **kwargs: Any) -> list[str]:
        return [*original(*args, **kwargs), "model.layers.1.mlp.up_proj"]

    monkeypatch.setattr(HfQuantizer, "get_modules_to_not_convert", staticmethod(one_more))
    problem = only_problem(quick("tiny-llama", quant=scheme), "quantised")
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
    problem = the_problem(quick("tiny-llama", quant="nf4"), "quantised")
    assert "is a Linear4bit, but its weight is a plain float32 tensor without quantisation state" in problem.message


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_another_layers_quantised_values(tampered: Callable[[Tamper], None], scheme: str) -> None:
    def tamper(model: Any) -> None:
        layers = model.model.layers
        layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj

    tampered(tamper)
    problem = only_problem(quick("tiny-llama", quant=scheme), "quantised")
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
    result = quick("tiny-llama", quant="nf4", skip_modules=("down_proj",))
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
    problem = only_problem(quick("tiny-mixtral", quant="nf4"), "quantised")
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
    problem = only_problem(quick("tiny-mixtral", quant="nf4"), "quantised")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_stretch_of_quantised_values(tampered: Callable[[Tamper], None], scheme: str) -> None:
    def tamper(model: Any) -> None:
        packed = model.model.layers[1].mlp.up_proj.weight.data
        rows = packed.shape[0]
        packed[rows // 2 : rows - rows // 16] = 0

    tampered(tamper)
    assert "is not the checkpoint's" in only_problem(quick("tiny-llama", quant=scheme), "quantised").message


@fused_experts
def test_a_subclass_of_linear_is_named(tmp_path: Path) -> None:
    """transformers 5 replaces ``nn.Linear`` itself only, and says something about eetq."""
    config = transformers.FalconConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
    )
    transformers.FalconForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    problem = only_problem(quick(Checkpoint(str(tmp_path), "shape", "weights"), quant="nf4"), "quantised")
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
    source = checkpoint("tiny-llama").path
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


# Dense weights


def test_a_load_that_was_upcast(tampered: Callable[[Tamper], None]) -> None:
    tampered(lambda model: model.float())
    problem = only_problem(quick("tiny-llama", dtype="bf16"), "dtype")
    assert "bfloat16 was requested, but" in problem.message
    assert "are float32" in problem.message
    assert any(name.startswith("model.layers.0.self_attn.q_proj.weight") for name in problem.names)


def test_an_upcast_that_nobody_named_a_dtype_for(tampered: Callable[[Tamper], None]) -> None:
    tampered(lambda model: model.model.layers[2].mlp.down_proj.float())
    problem = the_problem(quick("tiny-llama"), "dtype")
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
    problem = only_problem(quick(model), "values")
    assert "constant 1, as initialised and never loaded" in problem.message
    assert all("norm" in name for name in problem.names)


@fused_experts
@pytest.mark.parametrize("expert", [1, 2])
def test_one_expert_between_the_others(tampered: Callable[[Tamper], None], expert: int) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].mlp.experts.down_proj.data[expert].mul_(1.01)

    tampered(tamper)
    problem = only_problem(quick("tiny-mixtral"), "values")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.mlp.experts.down_proj"]


def test_values_that_differ_between_the_ends_and_the_middle(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight.data
            rows = weight.shape[0]
            weight[rows // 16 : rows * 7 // 16].mul_(1.01)
            weight[rows * 9 // 16 : rows * 15 // 16].mul_(1.01)

    tampered(tamper)
    assert len(only_problem(quick("tiny-llama"), "values").names) == 3


def test_values_that_differ(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1].self_attn.k_proj.weight.data.mul_(1.01)

    tampered(tamper)
    problem = only_problem(quick("tiny-qwen3"), "values")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.self_attn.k_proj.weight"]


@fused_experts
def test_fused_experts_that_were_joined_in_the_wrong_order(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.layers[1].mlp.experts.gate_up_proj.data
        weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))

    tampered(tamper)
    problem = only_problem(quick("tiny-mixtral"), "values")
    assert problem.names[0].startswith("model.layers.1.mlp.experts.gate_up_proj")


def _without(preset: str, directory: Path, *names: str) -> Checkpoint:
    """A copy of a checkpoint that lacks tensors."""
    source = checkpoint(preset)
    shutil.copytree(source.path, directory, dirs_exist_ok=True)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, file, {"format": "pt"})
    return Checkpoint(str(directory), "shape", "weights")


def test_a_missing_key(tmp_path: Path) -> None:
    files = _without("tiny-llama", tmp_path, "model.layers.2.mlp.up_proj.weight")
    problem = only_problem(quick(files), "keys")
    assert problem.names == ("model.layers.2.mlp.up_proj.weight",)
    assert "not in the checkpoint" in problem.message


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_key_behind_a_users_own_loader(tmp_path: Path, name: str) -> None:
    problem = only_problem(by_loader(_without("tiny-llama", tmp_path, name)), "keys")
    assert [told.split(" ")[0] for told in problem.names] == [name]
    assert "1 parameters of the model are not in the checkpoint" in problem.message


def test_a_checkpoint_under_other_names_is_noted(tmp_path: Path) -> None:
    """What a user's own loader calls them is not known: neither missing nor unused can be said of any."""
    files = _without("tiny-llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({f"other.{name}.w": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    result = by_loader(files)
    assert result.problems == []
    assert any("they may have other names there" in note for note in result.notes)


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
        problem = only_problem(quick("tiny-gpt-neox", quant=scheme), "keys")
        assert problem.names == ("gpt_neox.layers.1.mlp.dense_h_to_4h.bias",)


def test_a_layer_that_stands_in_for_another(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.model.layers[1] = model.model.layers[0]

    tampered(tamper)
    # With transformers 4 it does not run either: both write to one layer's cache.
    found = only_problem if int(transformers.__version__.partition(".")[0]) >= 5 else the_problem
    problem = found(quick("tiny-llama"), "values")
    assert all(name.startswith("model.layers.1.") for name in problem.names)


@pytest.mark.parametrize("said", [False, True])
def test_a_head_that_was_tied_to_the_embedding(tampered: Callable[[Tamper], None], said: bool) -> None:
    def tamper(model: Any) -> None:
        model.lm_head.weight = model.model.embed_tokens.weight
        model.config.tie_word_embeddings = said

    tampered(tamper)
    result = quick("tiny-llama")
    problem = the_problem(result, "values")
    assert [name.split(" ")[0] for name in problem.names] == ["lm_head.weight"]
    changed = ["config"] if said else []
    assert [other.check for other in result.problems if other.check != "values"] == changed


def test_an_unexpected_key_and_its_permission(tmp_path: Path) -> None:
    files = _without("tiny-llama", tmp_path)
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
    problem = only_problem(quick("tiny-llama", strategy="auto"), "devices")
    assert "are offloaded to disk; the load was for cpu" in problem.message
    assert all(name.startswith("model.layers.1.") for name in problem.names)
    assert problem.bytes > 0


def test_a_layer_without_values(tampered: Callable[[Tamper], None]) -> None:
    tampered(lambda model: model.model.layers[1].mlp.to("meta"))
    result = quick("tiny-llama")
    assert "are left without values on meta" in the_problem(result, "devices").message


def test_a_plan_that_was_not_kept(tampered: Callable[[Tamper], None]) -> None:
    from accelerate.hooks import remove_hook_from_module

    tampered(lambda model: remove_hook_from_module(model, recurse=True))
    result = quick("tiny-llama", strategy="offload")
    assert "the plan says disk" in the_problem(result, "devices").message
    assert "nothing is offloaded" in the_problem(result, "offload").message


def test_another_attention(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.config._attn_implementation = "eager"

    assert quick("tiny-llama", attn="eager").problems == []
    tampered(tamper)
    problem = only_problem(quick("tiny-llama", attn="sdpa"), "attention")
    assert "attention sdpa was requested, but eager is used" in problem.message


# Copies, numbers, forwards

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
    problem = only_problem(quick("tiny-llama"), "finite")
    assert "logits of the first forward are not finite" in problem.message


@pytest.mark.parametrize("fields", [{}, {"adapter": "random"}])
def test_logits_that_are_not_finite_after_the_prefill(tampered: Callable[[Tamper], None], fields: Any) -> None:
    def tamper(model: Any) -> None:
        def from_the_third(module: Any, inputs: Any, output: Any) -> Any:
            model.calls = 0 if output.shape[1] > 1 else getattr(model, "calls", 0) + 1
            return output * float("nan") if model.calls > 1 else output

        model.model.layers[1].mlp.register_forward_hook(from_the_third)

    tampered(tamper)
    problem = only_problem(quick("tiny-llama", **fields), "finite")
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
    problem = only_problem(quick("tiny-llama"), "finite")
    assert "the logits of 2 of 3 generated tokens are not finite, from token 2 on (decoded" in problem.message


def test_logits_that_are_not_finite_in_a_generations_prefill_only(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            # A generation asks for the logits of the last position only.
            return output * float("nan") if output.shape[1] == 1 else output

        model.lm_head.register_forward_hook(spoil)

    tampered(tamper)
    problem = only_problem(quick("tiny-llama"), "finite")
    assert "from token 1 on (the prefill's)" in problem.message


def test_a_weight_that_is_not_finite_where_no_token_looks(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.embed_tokens.weight.data
        weight[weight.shape[0] // 5, 5] = float("nan")
        weight[weight.shape[0] // 7, 7] = float("inf")

    tampered(tamper)
    problem = only_problem(quick("tiny-llama", dtype="fp16"), "finite")
    assert [name.split(" ")[0] for name in problem.names] == ["model.embed_tokens.weight"]
    assert "1 stored weights hold NaN or infinity" in problem.message


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
    result = quick("tiny-llama", **fields, workload=Workload(1, 16, 1))
    (told,) = [problem for problem in result.problems if problem.message.endswith("hold NaN or infinity")]
    # Some CPUs' kernels undo the nesting in the first forward.
    assert re.match(r"model\.layers\.1\.mlp\.up_proj\.weight's (nested )?scales", told.names[0])


def test_what_the_checkpoint_itself_holds_is_noted(tmp_path: Path) -> None:
    files = _without("tiny-llama", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 7] = float("-inf")
    save_file(tensors, file, {"format": "pt"})
    result = quick(files)
    assert result.problems == []
    assert "model.embed_tokens.weight is not finite, as the checkpoint has it" in result.notes


def test_a_sum_that_overflows_is_finite(tampered: Callable[[Tamper], None], tmp_path: Path) -> None:
    files = _without("tiny-llama", tmp_path)
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
    assert re.search(r"AssertionError: quant_state is required \(worker/test_faults\.py:\d+\)$", message)
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


# Mode, inputs, kernels


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
    problem = only_problem(quick(Checkpoint(str(tmp_path), "shape", "weights")), "forward")
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
    result = quick("tiny-llama", quant="nf4")
    (problem,) = [problem for problem in result.problems if problem.check == "forward"]
    assert re.search(r"\(bitsandbytes/[\w/]+\.py:\d+\)$", problem.message)
    assert "model.layers.0.mlp.up_proj.weight is 100 x 64" in problem.hint
