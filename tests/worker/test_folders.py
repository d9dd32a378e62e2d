"""Files and folders as they come: what is wrong with them is said by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loads import checkpoint, measured, quick
from transformers.models.llama import modeling_llama

from pytest_llmload.core.errors import LoadFailed, MachineError
from pytest_llmload.worker.checkpoints import hub
from pytest_llmload.worker.checkpoints.build import write_file
from pytest_llmload.worker.checkpoints.headers import Tensor, read_tensors
from pytest_llmload.worker.checkpoints.resolve import resolve


def zeroed_loader(spec: Any) -> Any:
    model = _loaded(spec)
    model.model.rotary_emb.inv_freq.zero_()
    return model


def cast_loader(spec: Any) -> Any:
    model = _loaded(spec)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.bfloat16()
    return model


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
    result = measured("tiny-llama", strategy="loader", target=target, options=(("target", json.dumps(target)),))
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
    problems = [problem for problem in quick("tiny-llama").problems if problem.check == "buffers"]
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
    result = quick(resolve(str(folder), tmp_path))
    hints = [problem.hint for problem in result.problems if problem.check == "keys"]
    assert any("keys_ok=['model.layers.2.*']" in hint for hint in hints), hints


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
    problems = quick(model).problems
    assert [problem.check for problem in problems] == ["config"]
    assert f"{field} is {value!r}" in problems[0].names[0]
