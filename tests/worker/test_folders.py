"""Files and folders as they come: what is wrong with them is said by its name."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from loads import by_target, checkpoint, judged, measured, quick
from planted_faults import Tamper
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.core.job import Checkpoint
from pytest_llmload.worker.checkpoints import hub
from pytest_llmload.worker.checkpoints.build import write_file
from pytest_llmload.worker.checkpoints.headers import Tensor
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.checkpoints.weights import read_tensors


def zeroed_loader(spec: Any) -> Any:
    model = _loaded(spec)
    model.model.rotary_emb.inv_freq.zero_()
    return model


def cast_loader(spec: Any) -> Any:
    model = _loaded(spec)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    return model


def loader_without_values(spec: Any) -> Any:
    config = transformers.AutoConfig.from_pretrained(spec.model)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def clean_loader(spec: Any) -> Any:
    return _loaded(spec)


def _loaded(spec: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")


@pytest.mark.parametrize(
    ("loader", "said"),
    [("clean_loader", ""), ("zeroed_loader", "they are constant 0"), ("cast_loader", "bfloat16, not float32")],
)
def test_what_the_constructor_computes_is_compared(loader: str, said: str) -> None:
    target = f"test_folders:{loader}"
    result = measured("tiny-llama", **by_target(target))
    assert not result.faults
    found = [problem for problem in result.problems if problem.check == "buffers"]
    assert [said in problem.message for problem in found] == ([True] if said else [])
    if said:
        assert "model.rotary_emb.inv_freq" in found[0].names[0]


def test_a_buffer_that_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = modeling_llama.LlamaRotaryEmbedding
    loading = modeling_llama.LlamaForCausalLM._move_missing_keys_from_meta_to_device

    def emptied(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = loading(self, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, rotary):
                module.inv_freq = torch.full_like(module.inv_freq, torch.nan, device="cpu")
        return found

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "_move_missing_keys_from_meta_to_device", emptied)
    monkeypatch.setattr(modeling_llama.LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
    problems = [problem for problem in judged("tiny-llama").problems if problem.check == "buffers"]
    assert "they hold NaN or infinity" in problems[0].message
    assert "model.rotary_emb.inv_freq" in problems[0].names[0]


def test_files_that_zero_3_has_emptied(tmp_path: Path) -> None:
    weights = [Tensor(f"model.layers.{index}.mlp.up_proj.weight", (0,), "BF16") for index in range(2)]
    write_file(tmp_path / "model.safetensors", [*weights, Tensor("model.norm.bias", (4,), "BF16")])
    with pytest.raises(LoadFailed, match=r"up_proj.weight is \[0\].*ZeRO-3"):
        read_tensors(tmp_path)


def test_a_shard_that_the_cache_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = {
        "metadata": {},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_file(tmp_path / "model-00001-of-00002.safetensors", [Tensor("a", (4,), "F32")])
    monkeypatch.setattr(hub, "_snapshot", lambda *args: tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match=r"1 of 2 files .* missing \(model-00002-of-00002.safetensors\)"):
        hub.download_model("org/model")


def test_many_unexpected_keys_have_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(checkpoint("tiny-llama").path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    result = judged(resolve(str(folder), tmp_path))
    hints = [problem.hint for problem in result.problems if problem.check == "keys"]
    assert any("keys_ok=['model.layers.2.*']" in hint for hint in hints), hints


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_with_the_prefix_of_a_wrapper(prefix: str, tmp_path: Path) -> None:
    """As torch.compile and DataParallel leave them in a state dict: the library loads none of them."""
    shutil.copytree(checkpoint("tiny-llama").path, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    missing, unused = quick(resolve(str(tmp_path), tmp_path)).problems
    assert missing.message == "30 tensors are not in the checkpoint, so the values are random"
    assert unused.message == "30 tensors are in the checkpoint, but not used by the model"
    assert all(name.startswith(prefix) for name in unused.names)
    assert f"keys_ok=['{prefix}*']" in unused.hint


def test_a_vocabulary_that_was_resized(tmp_path: Path) -> None:
    model = _loaded(SimpleNamespace(model=checkpoint("tiny-llama").path))
    model.resize_token_embeddings(1088)
    model.save_pretrained(tmp_path)
    result = quick(resolve(str(tmp_path), tmp_path))
    assert (result.problems, result.faults) == ([], [])


def test_a_tied_config_whose_file_has_both_tensors(tmp_path: Path) -> None:
    """The library leaves them apart where they differ, and says so: both are compared."""
    shutil.copytree(checkpoint("tiny-llama").path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    result = quick(resolve(str(tmp_path), tmp_path))
    assert (result.problems, result.faults) == ([], [])
    assert not [note for note in result.notes if "not compared" in note]
    assert any("specifies to tie model.embed_tokens.weight to lm_head.weight" in note for note in result.notes)


class _Registered(modeling_llama.LlamaForCausalLM):  # type: ignore[misc]
    """A class that only code of the user's knows."""


def test_a_class_that_the_users_code_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    class OwnConfig(LlamaConfig):  # type: ignore[misc]
        model_type = "our-own-llama"

    _Registered.config_class = OwnConfig
    folder = tmp_path / "own"
    shutil.copytree(checkpoint("tiny-llama").path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "our-own-llama", "architectures": ["_Registered"]}
    (folder / "config.json").write_text(json.dumps(config))
    files = resolve(str(folder), tmp_path)
    with pytest.raises(ValueError, match=r"no class '_Registered', which the checkpoint's config names.*--llm-import"):
        quick(files)
    from transformers import AutoConfig

    AutoConfig.register("our-own-llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, _Registered)
    result = quick(files)
    assert (result.problems, result.faults) == ([], [])


def test_values_in_8_bit_that_nothing_scales(tmp_path: Path, tampered: Callable[[Tamper], None]) -> None:
    """A file may keep weights in float8 as they are: they are not codes, and transformers casts them."""
    shutil.copytree(checkpoint("tiny-llama").path, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if "_proj" in name else tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    files = Checkpoint(str(tmp_path), "shape", "weights")
    result = quick(files)
    assert result.problems == []
    assert not [note for note in result.notes if "not compared" in note]
    tampered(lambda model: model.model.layers[1].mlp.up_proj.weight.data.normal_(std=0.02))
    (problem,) = quick(files).problems
    assert problem.names[0].startswith("model.layers.1.mlp.up_proj.weight")


def test_a_loader_that_loads_no_values() -> None:
    target = "test_folders:loader_without_values"
    result = measured("tiny-llama", **by_target(target))
    assert not result.faults
    assert re.match(r"\d+ tensors \(.*\) are left without values on meta", result.problems[0].message)


def test_a_class_with_a_weight_norm_saves_its_parts(tmp_path: Path, tampered: Callable[[Tamper], None]) -> None:
    """They are parametrizations, under these names in the file too."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Wav2Vec2Config(
        **sizes, vocab_size=32, conv_dim=[32] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4
    )
    transformers.Wav2Vec2ForCTC(config).save_pretrained(tmp_path)
    files = Checkpoint(str(tmp_path), "shape", "weights")
    result = quick(files)
    assert result.problems == []
    assert not [note for note in result.notes if "not found" in note or "not compared" in note]
    part = "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1"
    tampered(lambda model: model.get_parameter(part).data.normal_())
    (problem,) = quick(files).problems
    assert problem.names[0].startswith(part)


def test_a_typo_in_auto_class_says_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"auto_class\('AutoModelForCausalLMM'\).*did you mean AutoModelForCausalLM"):
        quick("tiny-llama", auto_class="AutoModelForCausalLMM")


@pytest.mark.parametrize(
    ("model", "field", "value"),
    [("tiny-llama", "rms_norm_eps", 0.1), ("tiny-gpt-neox", "use_parallel_residual", False)],
)
def test_a_config_that_the_load_changed_is_named_without_a_baseline(
    monkeypatch: pytest.MonkeyPatch, model: str, field: str, value: Any
) -> None:
    import transformers

    loading = transformers.PreTrainedModel.from_pretrained.__func__

    def changed(cls: type, *args: Any, **kwargs: Any) -> Any:
        found, info = loading(cls, *args, **kwargs)
        setattr(found.config, field, value)
        return found, info

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(changed))
    problems = judged(model).problems
    assert [problem.check for problem in problems] == ["config"]
    assert f"{field} is {value!r}" in problems[0].names[0]


def pickled(folder: Path, parts: int, **keywords: Any) -> Path:
    """Return a copy of tiny-llama of which the weights are pickled files."""
    source = Path(checkpoint("tiny-llama").path)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    if parts == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **keywords)
        return folder
    weight_map: dict[str, str] = {}
    for part in range(parts):
        name = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        own = {key: value for index, (key, value) in enumerate(tensors.items()) if index % parts == part}
        torch.save(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("parts", "keywords"),
    [(1, {}), (3, {}), (1, {"_use_new_zipfile_serialization": False})],
    ids=["one", "sharded", "old"],
)
def test_pickled_files_load_and_are_compared(
    parts: int, keywords: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve(str(pickled(tmp_path / "pickled", parts, **keywords)), tmp_path)
    assert files.shape == checkpoint("tiny-llama").shape
    result = quick(files)
    assert (result.problems, result.faults) == ([], [])
    assert not [note for note in result.notes if "not compared" in note]
    dense = quick("tiny-llama")
    assert result.metrics["host.weights"] == dense.metrics["host.weights"]
    assert quick(files, quant="nf4").problems == []
    zero_a_norm(monkeypatch)
    assert [problem.check for problem in quick(files).problems] == ["values"]


def zero_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault: every load leaves one norm at zero."""
    import transformers

    loading = transformers.PreTrainedModel.from_pretrained.__func__

    def zeroed(cls: type, *args: Any, **kwargs: Any) -> Any:
        found, info = loading(cls, *args, **kwargs)
        found.model.layers[1].input_layernorm.weight.data.zero_()
        return found, info

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(zeroed))


class Code:
    """What a pickled file must not run."""

    def __reduce__(self) -> Any:
        return print, ("run",)


def test_pickled_code_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = pickled(tmp_path / "code", 1)
    torch.save({"a": Code()}, folder / "pytorch_model.bin")
    with pytest.raises(LoadFailed, match=r"cannot be read as tensors alone \(weights_only\).*print"):
        resolve(str(folder), tmp_path)
    assert "run" not in capfd.readouterr().out


def other_loader(spec: Any) -> Any:
    """Load a file of a format of our own, in a folder that transformers would not load."""
    import transformers

    state = torch.load(Path(spec.model) / "consolidated.00.pth")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("tiny-llama").path, dtype="auto")
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("with_config", [True, False])
def test_a_loader_is_called_whatever_the_folder_holds(with_config: bool, tmp_path: Path) -> None:
    source = Path(checkpoint("tiny-llama").path)
    folder = tmp_path / "own"
    folder.mkdir()
    torch.save(load_file(source / "model.safetensors"), folder / "consolidated.00.pth")
    if with_config:
        shutil.copy(source / "config.json", folder)
    files = resolve(str(folder), tmp_path / "cache")
    target = "test_folders:other_loader"
    result = quick(files, **by_target(target))
    assert (result.problems, result.faults) == ([], [])
    assert files.unreadable
    assert any("were not compared" in note and "consolidated.00.pth" in note for note in result.notes), result.notes


LLAMA_GGUF = Path(__file__).parent.parent / "servers"


def as_gguf(file: Path) -> Path:
    """Write tiny-llama as llama.cpp's converter and quantiser would: matrices in Q8_0."""
    pytest.importorskip("gguf")
    sys.path.insert(0, str(LLAMA_GGUF))
    try:
        import gguf_model
    finally:
        sys.path.remove(str(LLAMA_GGUF))
    file.parent.mkdir(parents=True, exist_ok=True)
    gguf_model.write(Path(checkpoint("tiny-llama").path), file, "Q8_0")
    return file


@pytest.mark.parametrize("by_file", [False, True])
def test_a_gguf_file_loads_dense_and_that_is_said(
    by_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = as_gguf(tmp_path / "folder" / "tiny.gguf")
    files = resolve(str(file if by_file else file.parent), tmp_path / "cache")
    result = quick(files)
    assert (result.problems, result.faults) == ([], [])
    (said,) = (note for note in result.notes if "GGUF" in note)
    assert re.search(
        r"makes GGUF files dense, whatever its log says: 23 x Q8_0, 7 x F32, .* in the file, .* in memory", said
    )
    assert not [note for note in result.notes if "not compared" in note]
    assert "gguf" in result.environment
    assert result.metrics["host.weights"] > 3 * files.bytes
    zero_a_norm(monkeypatch)
    (problem,) = quick(files).problems
    assert "layers.1.input_layernorm.weight" in problem.names[0]


#: A tensor of a model with experts -> its name in GGUF.
_EXPERTS_GGUF = (
    (r"model\.embed_tokens\.weight", "token_embd.weight"),
    (r"model\.norm\.weight", "output_norm.weight"),
    (r"lm_head\.weight", "output.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"blk.\1.attn_norm.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"blk.\1.ffn_norm.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", r"blk.\1.attn_\2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight", r"blk.\1.attn_\2_norm.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.weight", r"blk.\1.attn_output.weight"),
    (r"model\.layers\.(\d+)\.mlp\.gate\.weight", r"blk.\1.ffn_gate_inp.weight"),
    (r"model\.layers\.(\d+)\.mlp\.experts\.down_proj", r"blk.\1.ffn_down_exps.weight"),
)


def write_experts(file: Path) -> None:
    """Write a random Qwen3 MoE as GGUF, its experts in three tensors a layer as llama.cpp's converter has them."""
    gguf = pytest.importorskip("gguf")
    # GGUF's size of an expert is not read: transformers takes its own default, 768.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "moe_intermediate_size": 768}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 256}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    state = transformers.Qwen3MoeForCausalLM(config).state_dict()
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(256)
    writer.add_expert_count(2)
    writer.add_expert_used_count(1)
    for name, value in state.items():
        written = {
            found.expand(given): value for pattern, given in _EXPERTS_GGUF if (found := re.fullmatch(pattern, name))
        }
        if name.endswith("experts.gate_up_proj"):
            block = f"blk.{name.split('.')[2]}.ffn_"
            gate, up = value.chunk(2, dim=1)
            written = {f"{block}gate_exps.weight": gate, f"{block}up_exps.weight": up}
        assert written, name
        for own, values in written.items():
            kind = gguf.GGMLQuantizationType.Q8_0 if values.dim() > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(own, gguf.quantize(values.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 5 joins experts")
def test_experts_of_a_gguf_file_are_compared_as_they_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experts(tmp_path / "experts.gguf")
    files = resolve(str(tmp_path / "experts.gguf"), tmp_path / "cache")
    result = quick(files)
    assert (result.problems, result.faults) == ([], [])
    (said,) = (note for note in result.notes if "GGUF" in note)
    assert re.search(r"makes GGUF files dense, whatever its log says: 10 x Q8_0, 5 x F32, ", said)
    assert not [note for note in result.notes if "not compared" in note]

    loading = transformers.PreTrainedModel.from_pretrained.__func__

    def swapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        model, info = loading(cls, *args, **kwargs)
        with torch.no_grad():
            experts = model.model.layers[0].mlp.experts.gate_up_proj
            experts.copy_(torch.cat(experts.chunk(2, dim=1)[::-1], dim=1).clone())
        return model, info

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(swapped))
    (problem,) = quick(files).problems
    assert problem.check == "values"
    assert "mlp.experts.gate_up_proj" in problem.names[0]


def gguf_loader(spec: Any) -> Any:
    import transformers

    (file,) = Path(spec.model).glob("*.gguf")
    return transformers.AutoModelForCausalLM.from_pretrained(spec.model, gguf_file=file.name)


def test_a_loader_of_a_gguf_file(tmp_path: Path) -> None:
    files = resolve(str(as_gguf(tmp_path / "tiny.gguf")), tmp_path / "cache")
    target = "test_folders:gguf_loader"
    result = quick(files, **by_target(target))
    assert (result.problems, result.faults) == ([], [])
    assert any("makes GGUF files dense" in note for note in result.notes)


def test_a_gguf_file_beside_safetensors_is_named_to_be_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(checkpoint("tiny-llama").path, folder)
    file = as_gguf(folder / "tiny.gguf")
    assert resolve(str(folder), tmp_path).shape == checkpoint("tiny-llama").shape
    assert resolve(str(file), tmp_path).weights != resolve(str(folder), tmp_path).weights
