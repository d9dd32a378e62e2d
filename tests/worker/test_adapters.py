"""Adapters: what a clean load is, and planted faults that are each caught and named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from loads import SMALL, adapter_files, checkpoint, job, judged, load, quick
from planted_faults import only_problem
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pytest_llmload.core.results import LoadResult, Problem
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.process.job_strategies import plan

WAYS = ("peft", "load_adapter")
V4 = transformers.__version__.startswith("4.")


def random_lora(directory: Path, preset: str = SMALL) -> Path:
    """A copy of the random adapter, to damage."""
    shutil.copytree(adapter_files("random", checkpoint(preset)).path, directory, dirs_exist_ok=True)
    return directory


def edit_weights(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return str(directory)


def edit_config(directory: Path, **changes: Any) -> str:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(directory)


def trained(directory: Path, **config: Any) -> str:
    """An adapter as PEFT itself saves it, with random values everywhere."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(SMALL).path)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **config)
    )
    for name, param in wrapped.named_parameters():
        if "modules_to_save" in name:
            param.data.mul_(1.5)
    wrapped.save_pretrained(directory)
    return str(directory)


def messages(result: LoadResult) -> list[str]:
    assert result.outcome == "not_applied", result.notes
    return [problem.message for problem in result.problems]


def adapter_problem(result: LoadResult) -> Problem:
    return only_problem(result, "adapter")


# Clean loads


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"adapter_via": "load_adapter"}, "bfloat16"),
        ({"adapter_via": "load_adapter", "quant": "nf4"}, "float32"),
        ({"quant": "int8", "dtype": "fp16"}, "float32"),
        ({"dtype": "fp16", "adapter_via": "load_adapter"}, "float16"),
        ({"strategy": "auto", "dtype": "fp32"}, "float32"),
        ({"quant": "nf4", "double_quant": True, "compute_dtype": "bf16"}, "float32"),
    ],
    ids=str,
)
def test_combinations_that_work(fields: dict[str, Any], dtype: str) -> None:
    result = quick(SMALL, adapter="random", **fields)
    assert [problem.message for problem in result.problems] == []
    rows = [row for row in result.manifest if ".lora_" in row.module]
    assert {row.dtype for row in rows} == {dtype}
    assert result.metrics["weights.adapter"] == sum(row.bytes for row in rows) > 0
    assert 0 < result.phases["adapter"] < result.phases["load"]
    assert any(f"in {dtype} (16 tensors)" in note for note in result.notes)
    moved = next(found for note in result.notes if (found := re.search(r"moves the logits by (\S+)", note)))
    assert float(moved[1]) > 0.3
    assert not [note for note in result.notes if "were not compared" in note or "imported during" in note]


@pytest.mark.skipif(V4, reason="transformers 4 keeps experts as a list of Linear")
@pytest.mark.parametrize("via", WAYS)
def test_the_base_is_compared_although_the_adapter_replaced_what_the_library_remembers(via: str) -> None:
    """transformers' load_adapter overwrites the model's record of fused experts by the adapter's."""
    result = quick("tiny-mixtral", adapter="random", adapter_via=via)
    assert result.problems == []
    assert not [note for note in result.notes if "were not compared" in note]


def test_the_adapter_is_apart_from_the_base_in_bytes_and_in_the_digest() -> None:
    plain, lora = quick(SMALL), quick(SMALL, adapter="random")
    size = lora.metrics["weights.adapter"]
    assert lora.metrics["host.weights"] == plain.metrics["host.weights"] + size
    assert lora.metrics["weights.logical"] == plain.metrics["weights.logical"] + size
    assert lora.digests["shape"] == plain.digests["shape"]
    assert lora.digests["weights"] != plain.digests["weights"]


@pytest.mark.parametrize(
    ("config", "via"),
    [
        ({"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "alpha_pattern": {"down_proj": 3}}, "peft"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "peft"),
        ({"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}, "load_adapter"),
    ],
    ids=["rslora", "modules-to-save", "embedding"],
)
def test_adapters_that_peft_saved(config: dict[str, Any], via: str, tmp_path: Path) -> None:
    result = quick(SMALL, adapter=trained(tmp_path, **config), adapter_via=via)
    assert [problem.message for problem in result.problems] == []


@pytest.mark.parametrize(("base", "via"), [({}, "load_adapter"), ({"quant": "nf4"}, "peft")], ids=str)
def test_the_plan_counts_the_adapter(base: dict[str, Any], via: str) -> None:
    fields = {"adapter": "random", "adapter_via": via, **base}
    planned, result = plan(job(SMALL, **fields)), quick(SMALL, **fields)
    for name in ("weights.adapter", "host.weights", "weights.logical"):
        assert planned[name] == result.metrics[name], name


# Planted faults


def wrong_keys(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("model.layers.", "model.blocks."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("init", "via"), [(True, "peft"), (False, "peft"), (False, "load_adapter")])
def test_wrong_keys(init: bool, via: str, tmp_path: Path) -> None:
    """Without init_lora_weights the layers get random values, and the logits move as if all were well."""
    directory = random_lora(tmp_path)
    edit_weights(directory, wrong_keys)
    adapter = edit_config(directory, init_lora_weights=init)
    result = judged(SMALL, adapter=adapter, adapter_via=via)
    found = messages(result)
    assert "16 of 16 tensors of the adapter's file are not in the model: the model has no such modules" in found[0]
    assert "16 of the adapter's 16 tensors in the model are left at their initial values" in found[1]
    assert result.problems[0].names[0].startswith("model.blocks.")
    assert (
        ".layers.0.self_attn.q_proj.lora_A.default.weight" in result.problems[1].names[0] + result.problems[1].names[1]
    )
    unchanged = [text for text in found if "the adapter changes nothing" in text]
    assert len(unchanged) == init


@pytest.mark.parametrize("via", WAYS)
def test_half_an_adapter(via: str, tmp_path: Path) -> None:
    adapter = edit_weights(random_lora(tmp_path), lambda all_: {k: v for k, v in all_.items() if ".layers.0." not in k})
    problem = adapter_problem(judged(SMALL, adapter=adapter, adapter_via=via))
    assert "8 of the adapter's 16 tensors in the model are left at their initial values" in problem.message
    assert all(".layers.0." in name for name in problem.names)
    assert problem.bytes > 0


@pytest.mark.parametrize("via", WAYS)
def test_an_adapter_for_other_target_modules(via: str, tmp_path: Path) -> None:
    adapter = edit_config(random_lora(tmp_path), target_modules=["gate_proj"])
    found = messages(quick(SMALL, adapter=adapter, adapter_via=via))
    assert "16 of 16 tensors" in found[0]
    assert "its config targets other modules (gate_proj)" in found[0]


def test_target_modules_that_the_model_does_not_have(tmp_path: Path) -> None:
    adapter = edit_config(random_lora(tmp_path), target_modules=["c_attn"])
    problem = adapter_problem(judged(SMALL, adapter=adapter))
    assert "the adapter cannot be attached to this model: " in problem.message
    assert "Target modules {'c_attn'} not found in the base model" in problem.message


def test_another_rank_than_the_configs(tmp_path: Path) -> None:
    adapter = edit_config(random_lora(tmp_path), r=4)
    assert "size mismatch" in adapter_problem(judged(SMALL, adapter=adapter)).message


def test_a_scaling_of_zero(tmp_path: Path) -> None:
    adapter = edit_config(random_lora(tmp_path), lora_alpha=0)
    found = messages(quick(SMALL, adapter=adapter))
    assert "the adapter is scaled by 0, so it does nothing, in 8 of 8 layers" in found[0]
    assert "the adapter changes nothing: the logits with it and without it are the same" in found[1]


def test_an_adapter_that_was_never_trained(tmp_path: Path) -> None:
    """Every check of tensors passes: the file says zeros."""

    def zeros(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}

    problem = adapter_problem(judged(SMALL, adapter=edit_weights(random_lora(tmp_path), zeros)))
    assert "the adapter changes nothing" in problem.message


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Makes every PeftModel go through a function before the check sees it."""

    def plant(tamper: Callable[[Any], Any]) -> None:
        original = peft.PeftModel.from_pretrained.__func__

        def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
            model = original(cls, *args, **kwargs)
            return tamper(model) or model

        monkeypatch.setattr(peft.PeftModel, "from_pretrained", classmethod(loading))

    return plant


def test_an_adapter_that_is_disabled(attached: Any) -> None:
    attached(lambda model: model.base_model.disable_adapter_layers())
    found = messages(quick(SMALL, adapter="random"))
    assert "the adapter is disabled, in 8 of 8 layers" in found[0]


def test_an_adapter_that_is_not_the_active_one(attached: Any) -> None:
    def tamper(model: Any) -> None:
        for path, module in model.named_modules():
            if ".layers.1." in path and isinstance(module, peft.tuners.lora.LoraLayer):
                module._active_adapter = []

    attached(tamper)
    problem = adapter_problem(judged(SMALL, adapter="random"))
    assert "the adapter is not active (active: none), in 4 of 8 layers" in problem.message
    assert all(".layers.1." in name for name in problem.names)


def test_a_second_adapter_that_is_active_beside_it(attached: Any) -> None:
    def tamper(model: Any) -> None:
        model.add_adapter("second", peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
        model.base_model.set_adapter(["default", "second"], inference_mode=True)

    attached(tamper)
    problem = adapter_problem(judged(SMALL, adapter="random"))
    assert "the adapter is not alone: second is active beside it, in " in problem.message
    assert any("q_proj" in name for name in problem.names)


def test_an_inactive_adapter_in_all_layers_changes_nothing(attached: Any) -> None:
    def tamper(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module._active_adapter = []

    attached(tamper)
    found = messages(quick(SMALL, adapter="random"))
    assert "not active" in found[0]
    assert "the adapter changes nothing" in found[1]


def test_a_scaling_that_is_not_the_configs(attached: Any) -> None:
    def tamper(model: Any) -> None:
        model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2

    attached(tamper)
    problem = adapter_problem(judged(SMALL, adapter="random"))
    assert "scaled by 4, its config says 2, in 1 of 8" in problem.message


def test_values_of_another_layer(attached: Any) -> None:
    def tamper(model: Any) -> None:
        layers = model.base_model.model.model.layers
        first, second = (layers[index].self_attn.q_proj.lora_B.default.weight for index in (0, 1))
        first.data, second.data = second.data, first.data

    attached(tamper)
    problem = adapter_problem(judged(SMALL, adapter="random"))
    assert "2 of 16 tensors do not hold the values of the adapter's file" in problem.message


def test_an_adapter_that_was_merged_without_a_request(attached: Any) -> None:
    attached(lambda model: model.merge_adapter())
    checks = {problem.check: problem.message for problem in judged(SMALL, adapter="random").problems}
    assert "merged into the weights, which was not requested" in checks["adapter"]
    assert "8 of" in checks["values"]


def test_an_adapter_that_is_dropped(attached: Any) -> None:
    attached(lambda model: model.unload())
    assert "there is no adapter in the model" in adapter_problem(judged(SMALL, adapter="random")).message


# The base below an adapter


def test_a_dense_layer_of_the_base_is_still_found(attached: Any) -> None:
    def tamper(model: Any) -> None:
        layer = model.base_model.model.model.layers[1].self_attn.q_proj
        layer.base_layer = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)

    attached(tamper)
    problems = judged(SMALL, quant="nf4", adapter="random").problems
    (problem,) = (problem for problem in problems if problem.check == "quantised")
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.self_attn.q_proj.weight"]


def test_values_of_the_base_are_still_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    original = transformers.PreTrainedModel.from_pretrained.__func__

    def loading(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = original(cls, *args, **kwargs)
        model.model.layers[1].self_attn.v_proj.weight.data.mul_(1.01)
        return model, info

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(loading))
    problem = only_problem(judged(SMALL, adapter="random"), "values")
    assert "layers.1.self_attn.v_proj.base_layer.weight" in problem.names[0]


def test_skipped_modules_go_by_the_names_without_the_adapter() -> None:
    result = quick(SMALL, quant="nf4", adapter="random", skip_modules=("model.layers.0.self_attn.q_proj",))
    assert result.problems == []
    assert any("1 weight (" in note and "is dense as skip_modules says" in note for note in result.notes)


# Merged


@pytest.mark.parametrize(
    ("preset", "base", "least", "most"),
    [
        (SMALL, {"dtype": "fp32"}, 0.0, 1e-5),
        (SMALL, {"quant": "int8"}, 0.01, 0.2),
        (SMALL, {"quant": "nf4"}, 0.1, 0.6),
        ("tiny-gpt2", {"dtype": "bf16"}, 1e-3, 0.1),
        ("tiny-gpt2", {"quant": "nf4"}, 0.1, 0.6),
    ],
    ids=str,
)
def test_a_merge_moves_the_logits_by_its_rounding_alone(
    preset: str, base: dict[str, Any], least: float, most: float
) -> None:
    result = quick(preset, adapter="random", adapter_merged=True, **base)
    assert [problem.message for problem in result.problems] == []
    assert result.metrics["weights.adapter"] == 0
    assert not [row for row in result.manifest if "lora" in row.module]
    moved = next(found for note in result.notes if (found := re.search(r"merging moved the logits by (\S+)", note)))
    assert least <= float(moved[1]) <= most


def test_merged_through_load_adapter() -> None:
    result = quick(SMALL, adapter="random", adapter_merged=True, adapter_via="load_adapter")
    assert result.problems == []
    assert result.metrics["weights.adapter"] > 0


def test_merged_adapters_of_other_kinds(tmp_path: Path) -> None:
    config = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}
    result = quick(SMALL, adapter=trained(tmp_path, **config), adapter_merged=True)
    assert [problem.message for problem in result.problems] == []


def test_a_merge_that_lost_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    result = judged(SMALL, adapter="random", adapter_merged=True)
    assert {problem.check for problem in result.problems} == {"merged"}
    weights, logits = messages(result)
    assert "8 of 8 weights are not the checkpoint's with the adapter merged in" in weights
    assert re.search(r"merging moved the logits by 0\.\d+ \(relative\); rounding the sums to bfloat16 explains", logits)


@pytest.mark.parametrize("base", [{}, {"quant": "nf4"}], ids=str)
def test_a_merge_that_lost_one_layer(base: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []
    kinds = [peft.tuners.lora.Linear, peft.tuners.lora.Linear4bit]
    for kind in kinds:
        delta = kind.get_delta_weight

        def once(self: Any, adapter: str, delta: Any = delta) -> Any:
            layers.append(self)
            return delta(self, adapter) * (0 if len(layers) == 1 else 1)

        monkeypatch.setattr(kind, "get_delta_weight", once)
    result = judged(SMALL, adapter="random", adapter_merged=True, **base)
    problem = next(problem for problem in result.problems if "not the checkpoint's with" in problem.message)
    assert "1 of 8 weights is not" in problem.message
    assert problem.names == ("model.layers.0.self_attn.q_proj.weight",)


# Loaders and combinations that libraries break


def peft_loader(spec: LoadSpec) -> Any:
    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")
    return peft.PeftModel.from_pretrained(model, spec.adapter, adapter_name="prod")


def forgetful_loader(spec: LoadSpec) -> Any:
    return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")


def loader(name: str) -> dict[str, Any]:
    return {"strategy": "loader", "target": f"test_adapters:{name}", "adapter": "random"}


def test_a_users_own_loader_with_an_adapter() -> None:
    result = quick(SMALL, **loader("peft_loader"))
    assert [problem.message for problem in result.problems] == []
    assert result.metrics["weights.adapter"] > 0


def test_a_users_own_loader_that_forgets_the_adapter() -> None:
    problem = adapter_problem(judged(SMALL, **loader("forgetful_loader")))
    assert "there is no adapter in the model" in problem.message


def test_an_adapter_on_a_model_on_disk_is_refused_before_peft_copies_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problem = adapter_problem(quick(SMALL, strategy="offload", adapter="random"))
    assert "part of it is on disk, where peft would copy the checkpoint to a folder" in problem.message
    assert list(tmp_path.iterdir()) == []


def test_offload_with_load_adapter_is_broken_by_transformers() -> None:
    """transformers 4 refuses, 5 leaves the adapters of offloaded layers on meta."""
    found = messages(quick(SMALL, strategy="offload", adapter="random", adapter_via="load_adapter"))
    assert ("cannot be attached" if V4 else "8 tensors of the adapter are left without values on meta") in found[0]


def test_int8_with_load_adapter_is_refused_by_transformers_4() -> None:
    result = quick(SMALL, quant="int8", adapter="random", adapter_via="load_adapter")
    if V4:
        assert "cannot be attached to this model: ValueError: `.to` is not supported" in adapter_problem(result).message
    else:
        assert result.problems == []


@pytest.mark.parametrize("strategy", ["offload", "max_memory"])
def test_int8_with_offload_is_dense_on_a_cpu_run(strategy: str) -> None:
    (problem,) = (p for p in judged("tiny-llama", strategy=strategy, quant="int8").problems if p.check == "quantised")
    assert "nothing was quantised to int8" in problem.message
    assert "bitsandbytes keeps dense what a device map puts on the CPU or the disk" in problem.message


def test_the_adapters_of_a_served_load_stay_as_they_were() -> None:
    """Disabling them for the check must not make them trainable, or leave them disabled."""
    _, loaded = load(SMALL, adapter="random")
    layers = loaded.inventory.wrapping.tuned.values()
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    assert not any(param.requires_grad for param in loaded.model.parameters())
