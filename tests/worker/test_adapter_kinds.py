"""Every kind of adapter that PEFT registers: clean as a bare script saved it, and red with a fault planted."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import adapter_kinds
import peft
import pytest
import torch
import transformers
from adapter_kinds import KINDS, Kind
from loads import checkpoint, job, judged, quick
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import layer as lora_layer
from peft.utils import loftq_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.results import Problem
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checks import adapter, values
from pytest_llmload.worker.model.loaded import Loaded

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ["q_proj", "v_proj"]
OLORA = {"init_lora_weights": "olora"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
#: Bytes that a kind keeps where only a hook of its gradient sees them: CPT's mask of four tokens.
HOOKS = {"cpt": 4}
#: Kinds that learn a prompt, and have no layers in the model.
PROMPTS = ("PromptTuning", "MultitaskPromptTuning", "PromptEncoder", "PrefixTuning", "CPT", "Cartridge")
LAYERED = [name for name, kind in KINDS.items() if kind.config.removesuffix("Config") not in PROMPTS]
#: Kinds whose layers have a scaling.
SCALED = [name for name in KINDS if KINDS[name].config in ("LoraConfig", "AdaLoraConfig")]
SCALED += ["gralora", "lily", "loha", "lokr", "peanut", "psoft", "randlora", "randlora_not_saved", "shira"]


@pytest.fixture(scope="module", autouse=True)
def loftq_without_a_gpu() -> Iterator[None]:
    """Let LoftQ initialise where there is no GPU: PEFT's own code, with the CPU in place of its device."""
    if torch.cuda.is_available():
        yield
        return
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    scope = vars(loftq_utils).copy()
    exec(source.replace('"cuda"', '"cpu"'), scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_layer, "loftq_init", scope["loftq_init"])
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("small-llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return resolve(f"random:{folder}", tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def saved(small: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return the directory of an adapter that a bare script saved, by its kind."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def directory(name: str) -> str:
        if name == "adamss":
            pytest.importorskip("sklearn")
        adapter_kinds.save(KINDS[name], adapter_kinds.fresh(small.path), folder / name)
        return str(folder / name)

    return directory


def attach(small: Checkpoint, directory: str) -> Any:
    """A model with the adapter, as a bare script loads it."""
    return peft.PeftModel.from_pretrained(adapter_kinds.fresh(small.path), directory, torch_device="cpu")


def bytes_of(small: Checkpoint, directory: str) -> int:
    """What an adapter brings, by counting the tensors that exist since it was attached, less what it took away."""
    model = adapter_kinds.fresh(small.path)
    before = sum(_storages([*model.parameters(), *model.buffers()]).values())
    gc.freeze()
    wrapped = peft.PeftModel.from_pretrained(model, directory, torch_device="cpu")
    gc.collect()
    came = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    return sum(_storages([*came, *wrapped.parameters(), *wrapped.buffers()]).values()) - before


def _storages(tensors: list[Any]) -> dict[int, int]:
    """Address -> bytes of each storage, once."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def looked_at(small: Checkpoint, directory: str, model: Any) -> list[Problem]:
    """What the checks of adapters say of a model that is to have the adapter of a directory."""
    loaded = Loaded(job(small, adapter=directory), model)
    return [*adapter.check(loaded), *adapter.output(loaded)]


def test_every_kind_of_adapter_is_in_the_table() -> None:
    """A kind that a later release of PEFT brings fails here until it is looked at."""
    known = {str(adapter_kinds.configuration(kind).peft_type.value) for kind in KINDS.values()}
    assert known | {"XLORA"} == {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


@pytest.mark.parametrize("name", KINDS)
def test_a_clean_load(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    result = quick(small, adapter=saved(name))
    assert [problem.message for problem in result.problems] == []
    assert not [note for note in result.notes if "not compared" in note]
    assert result.metrics["weights.adapter"] == bytes_of(small, saved(name)) - HOOKS.get(name, 0)


# A cartridge's state is put together of parts when it is asked for: a changed copy changes nothing in the model.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "cartridge"])
def test_one_tensor_that_was_not_loaded(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    """Its values are those of a different training; the requested file says which are right."""
    wrapped = attach(small, saved(name))
    loaded = Loaded(job(small, adapter=saved(name)), wrapped)
    stored = loaded.attached.stored(loaded.inventory.state())
    with safe_open(f"{saved(name)}/adapter_model.safetensors", framework="pt") as file:
        # PEFT saves the weight of an embedding or head beside its adapter; it is the base's.
        assert len(stored) == sum(not key.endswith(".base_layer.weight") for key in list(file.keys()))
    held = {id(each.tensor): each.path for each in loaded.inventory.held}
    victim = next(tensor for tensor in stored.values() if id(tensor) in held)
    with torch.no_grad():
        victim.copy_(victim + 1 if victim.is_floating_point() else victim.flip(0).roll(1))
    (problem, *_) = looked_at(small, saved(name), wrapped)
    assert "not hold the values of the adapter's file" in problem.message
    assert held[id(victim)] in problem.names


def test_a_cartridge_of_a_different_training(small: Checkpoint, saved: Callable[[str], str]) -> None:
    """Its parts in the model are changed, of which PEFT puts its state together."""
    wrapped = attach(small, saved("cartridge"))
    parts = [param for name, param in wrapped.named_parameters() if name.startswith("prompt_encoder.")]
    assert parts
    with torch.no_grad():
        for param in parts:
            param += 1
    (problem, *_) = looked_at(small, saved("cartridge"), wrapped)
    assert "not hold the values of the adapter's file" in problem.message
    assert problem.names[0].startswith("prompt_e")


@pytest.mark.parametrize("name", sorted({"lora", "loha", "oft", "vera", "prompt_tuning", "adaption_prompt", "shadow"}))
def test_an_adapter_that_was_forgotten(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    (problem,) = looked_at(small, saved(name), adapter_kinds.fresh(small.path))
    assert "there is no adapter in the model" in problem.message


@pytest.mark.parametrize("name", LAYERED)
def test_an_adapter_that_is_disabled(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    wrapped = attach(small, saved(name))
    wrapped.base_model.disable_adapter_layers()
    messages = [problem.message for problem in looked_at(small, saved(name), wrapped)]
    assert messages
    assert any("disabled" in text or "no adapter" in text or "not in the model" in text for text in messages)


@pytest.mark.parametrize("name", SCALED)
def test_a_scaling_of_zero(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    wrapped = attach(small, saved(name))
    scaled = [m for m in wrapped.modules() if isinstance(getattr(m, "scaling", None), dict) and m.scaling]
    assert scaled
    for layer in scaled:
        layer.scaling = dict.fromkeys(layer.scaling, 0.0)
    messages = [problem.message for problem in looked_at(small, saved(name), wrapped)]
    assert f"the adapter is scaled by 0, so it does nothing, in {len(scaled)} of" in messages[0]


@pytest.mark.parametrize("name", ["pissa", "loftq"])
def test_a_weight_that_the_adapter_changed_wrongly(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    """These kinds change the weights below them while they are attached; one of these is changed once more."""
    wrapped = attach(small, saved(name))
    weight = "base_model.model.model.layers.1.self_attn.v_proj.base_layer.weight"
    wrapped.get_parameter(weight).data *= 1.1
    (problem,) = values.check(Loaded(job(small, adapter=saved(name)), wrapped))
    assert problem.message.startswith("1 of 29 dense tensors does not hold the checkpoint's values")
    assert weight in problem.names[0]


def rewritten_file(source: str, directory: Path, change: Callable[[str, Any], tuple[str, Any]]) -> str:
    """Copy an adapter, with each tensor and its name changed."""
    shutil.copytree(source, directory, dirs_exist_ok=True)
    file = directory / "adapter_model.safetensors"
    save_file(dict(change(name, tensor) for name, tensor in load_file(file).items()), file)
    return str(directory)


def test_a_file_with_the_names_of_the_live_model(
    small: Checkpoint, saved: Callable[[str], str], tmp_path: Path
) -> None:
    """A state dict that was written as it is; PEFT loads it."""

    def live(name: str, tensor: Any) -> tuple[str, Any]:
        return re.sub(r"\.weight$", ".default.weight", name), tensor

    result = quick(small, adapter=rewritten_file(saved("lora"), tmp_path, live))
    assert [problem.message for problem in result.problems] == []


def test_an_adapter_whose_file_holds_nan(small: Checkpoint, saved: Callable[[str], str], tmp_path: Path) -> None:
    """The model holds what the file has: that is not a tensor of other values."""

    def broken(name: str, tensor: Any) -> tuple[str, Any]:
        return name, tensor * float("nan") if "layers.1.self_attn.v_proj.lora_B" in name else tensor

    problems = judged(small, adapter=rewritten_file(saved("lora"), tmp_path, broken)).problems
    assert {problem.check for problem in problems} == {"finite", "adapter"}
    assert not [problem for problem in problems if "values of the adapter's file" in problem.message]


@pytest.mark.parametrize(("part", "runs"), [("vision_tower", False), ("language_model.layers.0.mlp", True)])
def test_an_adapter_of_parts_that_do_not_run_for_text(
    part: str, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it changes no logits of a prompt of text says nothing, unless what holds its layers runs."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes, "image_size": 32, "patch_size": 16},
        text_config={"model_type": "llama", **sizes, "vocab_size": 512},
        image_token_index=510,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    targets = rf".*{part}.*(q_proj|up_proj)"
    adapter_kinds.save(Kind("LoraConfig", {"r": 4, "target_modules": targets}), model, tmp_path / "adapter")
    # The owner computes without the layer that the adapter tunes.
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: self.down_proj(self.gate_proj(x)))
    files = Checkpoint(str(tmp_path), "shape", "weights")
    result = quick(files, adapter=str(tmp_path / "adapter"))
    nothing = "the adapter changes nothing: the logits with it and without it are the same"
    assert [problem.message for problem in result.problems] == ([nothing] if runs else [])
    assert any("that it tunes do not run for text" in note for note in result.notes) is not runs


def test_corda_cannot_be_attached_as_it_was_saved(
    small: Checkpoint, saved: Callable[[str], str], tmp_path: Path
) -> None:
    """PEFT initialises it anew, for which it needs activations that only the training script had."""
    shutil.copytree(saved("lora"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "corda"}))
    (problem,) = judged(small, adapter=str(tmp_path)).problems
    assert "the adapter cannot be attached to this model: ValueError: `eigens` attribute not found" in problem.message


def test_a_mixture_of_adapters_needs_its_parts(small: Checkpoint, saved: Callable[[str], str], tmp_path: Path) -> None:
    """X-LoRA needs a cache that is off, and its parts as arguments: only a loader of the user's own can give both."""
    weights = (Path(saved("lora")) / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    config = {"peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": 128, "adapters": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (problem,) = judged(small, adapter=str(tmp_path)).problems
    assert "the adapter cannot be attached to this model: ValueError: " in problem.message
    assert "`use_cache` must be False" in problem.message


def loader_that_attaches(spec: LoadSpec) -> Any:
    return peft.PeftModel.from_pretrained(adapter_kinds.base(spec.model), os.environ["ATTACHED"], torch_device="cpu")


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "cartridge", "ia3", "trainable_tokens"])
def test_an_adapter_that_was_not_asked_for(
    name: str, small: Checkpoint, saved: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTACHED", saved(name))
    result = judged(small, strategy="loader", target="test_adapter_kinds:loader_that_attaches")
    assert result.outcome == "not_applied"
    assert "a PEFT adapter (" in result.problems[0].message
    assert "but the test requests none" in result.problems[0].message
    assert result.problems[0].bytes > 0


def loader_that_compiles(spec: LoadSpec) -> Any:
    return torch.compile(peft.PeftModel.from_pretrained(adapter_kinds.base(spec.model), spec.adapter))


def loader_that_compiles_data_parallelism(spec: LoadSpec) -> Any:
    return torch.compile(torch.nn.DataParallel(loader_that_compiles(spec)))


def loader_that_compiles_before_it_attaches(spec: LoadSpec) -> Any:
    return peft.PeftModel.from_pretrained(torch.compile(adapter_kinds.base(spec.model)), spec.adapter)


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """Run what torch.compile was called on without a compiler, which takes seconds for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("no_kernels")
@pytest.mark.parametrize("loader", [loader_that_compiles, loader_that_compiles_data_parallelism])
def test_a_model_that_is_compiled_with_its_adapter(
    loader: Callable[[LoadSpec], Any], small: Checkpoint, saved: Callable[[str], str]
) -> None:
    fields = {"strategy": "loader", "target": f"test_adapter_kinds:{loader.__name__}"}
    result = quick(small, adapter=saved("lora"), **fields)
    assert (result.problems, result.faults) == ([], [])
    assert not [note for note in result.notes if "were not compared" in note or "may have other names" in note]
    assert not [row.module for row in result.manifest if "_orig_mod" in row.module or "module." in row.module]


@pytest.mark.usefixtures("no_kernels")
def test_an_adapter_that_is_attached_to_a_compiled_model_is_dead(
    small: Checkpoint, saved: Callable[[str], str]
) -> None:
    """PEFT looks for the names of the module that torch.compile has put around the model, and warns only."""
    fields = {"strategy": "loader", "target": "test_adapter_kinds:loader_that_compiles_before_it_attaches"}
    result = quick(small, adapter=saved("lora"), **fields)
    assert not result.faults
    assert [problem.message for problem in result.problems] == [
        "8 of 8 tensors of the adapter's file are not in the model: the model has no such modules",
        "8 of the adapter's 8 tensors in the model are left at their initial values: its file has none for them",
        "the adapter changes nothing: the logits with it and without it are the same",
    ]


def test_an_adapter_that_lies_beside_the_checkpoint(
    small: Checkpoint, saved: Callable[[str], str], tmp_path: Path
) -> None:
    """transformers attaches it without being asked."""
    shutil.copytree(small.path, tmp_path, dirs_exist_ok=True)
    shutil.copytree(saved("lora"), tmp_path, dirs_exist_ok=True)
    result = judged(dataclasses.replace(small, path=str(tmp_path)))
    assert result.outcome == "not_applied"
    assert "a PEFT adapter (LORA) is in the model, in 4 modules" in result.problems[0].message


# Other bases: the same mechanism where layers have other names, are fused, or are quantised


@pytest.mark.parametrize(
    ("preset", "quant", "kind"),
    [
        ("tiny-gpt-neox", "none", Kind("VeraConfig", {"r": 8, "target_modules": ["query_key_value"]})),
        ("tiny-gpt-neox", "none", Kind("PrefixTuningConfig", {"num_virtual_tokens": 4})),
        ("tiny-gpt-neox", "nf4", Kind("OFTConfig", {"oft_block_size": 16, "target_modules": ["query_key_value"]})),
        ("tiny-llama", "nf4", Kind("VBLoRAConfig", {"num_vectors": 16, "vector_length": 32, "target_modules": NAMES})),
        ("tiny-llama", "nf4", Kind("PromptTuningConfig", {"num_virtual_tokens": 4})),
        ("tiny-mixtral", "none", Kind("LoraConfig", {"r": 4, "target_modules": NAMES, "target_parameters": EXPERTS})),
        ("tiny-gpt2", "none", Kind("LoraConfig", {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "pissa"})),
        ("tiny-llama", "nf4", Kind("LoraConfig", {"r": 4, "target_modules": NAMES, **OLORA})),
        ("tiny-gpt-neox", "int8", Kind("LoraConfig", {"r": 4, "target_modules": ["query_key_value"], **OLORA})),
    ],
    ids=lambda value: value.config if isinstance(value, Kind) else value,
)
def test_a_clean_load_on_another_base(preset: str, quant: str, kind: Kind, tmp_path: Path) -> None:
    adapter_kinds.save(kind, adapter_kinds.base(checkpoint(preset).path), tmp_path)
    result = quick(preset, adapter=str(tmp_path), quant=quant)
    assert [problem.message for problem in result.problems] == []
    assert result.metrics["weights.adapter"] > 0


def loader_of_olora(spec: LoadSpec) -> Any:
    """Attach an OLoRA to an nf4 base, and scale one of the weights that it has changed."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = adapter_kinds.base(spec.model, quantization_config=config, device_map={"": "cpu"})
    wrapped = peft.PeftModel.from_pretrained(model, spec.adapter, torch_device="cpu")
    wrapped.base_model.model.model.layers[1].self_attn.v_proj.base_layer.weight.quant_state.absmax *= 1.1
    return wrapped


def test_a_quantised_base_that_olora_changed_wrongly(tmp_path: Path) -> None:
    kind = Kind("LoraConfig", {"r": 4, "target_modules": NAMES, **OLORA})
    adapter_kinds.save(kind, adapter_kinds.base(checkpoint("tiny-llama").path), tmp_path)
    fields = {"strategy": "loader", "target": "test_adapter_kinds:loader_of_olora"}
    (problem,) = judged("tiny-llama", adapter=str(tmp_path), quant="nf4", **fields).problems
    assert problem.check == "quantised"
    assert [name.split(" ")[0] for name in problem.names] == ["model.layers.1.self_attn.v_proj.weight"]


# transformers' own way of attaching


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="what transformers 5 does")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alora", "the adapter changes nothing: the logits with it and without it are the same"),
        ("dora", "4 of 12 tensors do not hold the values of the adapter's file"),
        ("randlora", "2 of 18 tensors of the adapter's file are not in the model: the layers of the adapter share"),
        ("vera", "the adapter cannot be attached to this model: ValueError: `inject_adapter_in_model` does not"),
        ("prompt_tuning", "the adapter cannot be attached to this model: ValueError: `create_and_replace` does not"),
    ],
)
def test_what_load_adapter_does_not_do(name: str, message: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    (problem,) = judged(small, adapter=saved(name), adapter_via="load_adapter").problems
    assert message in problem.message


# Merged


@pytest.mark.parametrize("name", ["loha", "dora", "vera", "unilora", "token_indices", "trainable_tokens", "pissa"])
def test_a_clean_merge(name: str, small: Checkpoint, saved: Callable[[str], str]) -> None:
    result = quick(small, adapter=saved(name), adapter_merged=True)
    assert [problem.message for problem in result.problems] == []
    assert any("is not a plain LoRA" in note for note in result.notes)


@pytest.mark.parametrize("name", ["loha", "trainable_tokens"])
def test_a_merge_that_was_lost(
    name: str, small: Checkpoint, saved: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    (problem,) = judged(small, adapter=saved(name), adapter_merged=True).problems
    assert "the adapter is not merged into " in problem.message
    assert problem.names[0].endswith("embed_tokens" if name == "trainable_tokens" else "self_attn.q_proj")


def test_a_learned_prompt_cannot_be_merged(small: Checkpoint, saved: Callable[[str], str]) -> None:
    (problem,) = judged(small, adapter=saved("prompt_tuning"), adapter_merged=True).problems
    assert "it is a learned prompt, which has no weights that could be merged" in problem.message


def loader_that_merges(spec: LoadSpec) -> Any:
    return peft.PeftModel.from_pretrained(adapter_kinds.base(spec.model), spec.adapter).merge_and_unload()


def test_a_merge_that_was_not_asked_for_is_the_first_line(small: Checkpoint, saved: Callable[[str], str]) -> None:
    fields = {"strategy": "loader", "target": "test_adapter_kinds:loader_that_merges"}
    first, *_ = judged(small, adapter=saved("lora"), **fields).problems
    assert first.message.startswith("the adapter is merged into the model's weights, which was not requested")


@pytest.mark.parametrize("trained", [["lm_head", "embed_tokens"], ["embed_tokens"]], ids=len)
def test_a_merge_of_trained_copies_unties_them(trained: list[str], tmp_path: Path) -> None:
    """PEFT then says so in the live config; the weights are the adapter's, and that is no fault."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    tied = resolve(f"random:{tmp_path}", tmp_path / "cache")
    kind = Kind("LoraConfig", {"r": 4, "target_modules": NAMES, "modules_to_save": trained})
    adapter_kinds.save(kind, adapter_kinds.base(tied.path), tmp_path / "adapter")
    result = quick(tied, adapter=str(tmp_path / "adapter"), adapter_merged=True)
    assert [problem.message for problem in result.problems] == []


def test_a_merge_into_a_head_that_is_tied_to_the_embedding(tmp_path: Path) -> None:
    """PEFT changes the embedding with it; both are told, and the logits are held against untied ones."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    tied = resolve(f"random:{tmp_path}", tmp_path / "cache")
    adapter_kinds.save(KINDS["head"], adapter_kinds.base(tied.path), tmp_path / "adapter")
    problems = judged(tied, adapter=str(tmp_path / "adapter"), adapter_merged=True).problems
    assert {problem.check for problem in problems} == {"values", "merged"}
    (logits,) = (problem.message for problem in problems if problem.check == "merged")
    moved = re.match(r"merging moved the logits by (\S+) \(relative\); rounding the sums to \S+ explains (\S+)", logits)
    assert moved is not None
    assert float(moved[1]) > 5 * float(moved[2])
