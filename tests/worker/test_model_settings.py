"""Faults that leave every module as it was: each is `changed` against a baseline, and named by its field."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loads import checkpoint, judged, quick
from planted_faults import Tamper
from transformers import cache_utils
from transformers.models.llama import modeling_llama

from pytest_llmload.baselines import codec
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.spec import Workload
from pytest_llmload.core.verdicts import CHANGED, OK, REGRESSED, Comparison
from pytest_llmload.worker.checks import config_fields, values


@functools.cache
def recorded(model: str, **fields: Any) -> Baseline:
    """Return the baseline of a clean load, as a file holds it."""
    baseline = record(None, [quick(model, **fields)], update=True).baseline
    assert baseline is not None
    return codec.loads(codec.dumps(baseline), "test")


def gated(result: LoadResult, model: str = "tiny-llama", **fields: Any) -> Comparison:
    assert result.ok, result.problems
    assert not result.faults
    return compare(recorded(model, **fields), result, metrics=["manifest", "numbers", "host.growth"])


def texts(comparison: Comparison) -> list[str]:
    return [change.text for change in comparison.manifest]


def verdict(comparison: Comparison, name: str) -> tuple[str, str]:
    found = next(item for item in comparison.metrics if item.name == name)
    return found.verdict, found.reason


@pytest.fixture(autouse=True)
def _recorded_before_anything_is_planted() -> None:
    recorded("tiny-llama")


@pytest.mark.parametrize("fields", [{}, {"quant": "nf4"}, {"strategy": "offload"}], ids=["none", "nf4", "offload"])
def test_a_clean_load_is_as_recorded(fields: dict[str, Any]) -> None:
    comparison = gated(quick("tiny-llama", **fields), **fields)
    assert (comparison.verdict, texts(comparison)) == (OK, [])


def _no_cache(model: Any) -> None:
    model.config.use_cache = False


def _static_cache(model: Any) -> None:
    model.generation_config.cache_implementation = "static"


def _eager(model: Any) -> None:
    model.set_attn_implementation("eager")


def _recomputed(model: Any) -> None:
    model.gradient_checkpointing_enable()


def _trained(model: Any) -> None:
    model.train()


def _not_trainable(model: Any) -> None:
    model.requires_grad_(False)


def _sampled(model: Any) -> None:
    model.generation_config.do_sample = True


def _ended(model: Any) -> None:
    model.generation_config.eos_token_id = 7


def _padded(model: Any) -> None:
    model.generation_config.pad_token_id = 9


def _epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def _scaling(model: Any) -> None:
    model.model.layers[2].self_attn.scaling = 0.25


def _window(model: Any) -> None:
    model.config.sliding_window = 64


def _not_causal(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


def _dropout(model: Any) -> None:
    model.model.layers[0].self_attn.attention_dropout = 0.1


def _rope_scaling(model: Any) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def _one_expert(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1


def _one_after_the_other(model: Any) -> None:
    model.gpt_neox.layers[1].use_parallel_residual = False


def _activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = torch.nn.GELU().eval()


@pytest.mark.parametrize(
    ("tamper", "text"),
    [
        (_static_cache, "cache.class: DynamicCache -> StaticCache"),
        (_eager, "attention: sdpa -> eager"),
        (_recomputed, "mode.gradient_checkpointing: 0 modules -> 4 modules"),
        (_trained, "mode.training: 0 modules -> 46 modules"),
        (_not_trainable, "mode.requires_grad: 30 of 30 parameters -> 0 of 30 parameters"),
        (_sampled, "generation.do_sample: false -> true"),
        (_ended, "generation.eos_token_id: none -> 7"),
        (_padded, "generation.pad_token_id: 0 -> 9"),
        (_epsilon, "LlamaRMSNorm.variance_epsilon: 1e-05 -> 1e-05 x 6, 0.001 in model.layers.1.input_layernorm"),
        (_scaling, "LlamaAttention.scaling: 0.125 -> 0.125 x 2, 0.25 in model.layers.2.self_attn"),
        (_window, "config.sliding_window: none -> 64"),
        (_not_causal, "LlamaAttention.is_causal: true -> none"),
        (_dropout, "LlamaAttention.attention_dropout: 0.0 -> 0.0 x 2, 0.1 in model.layers.0.self_attn"),
        (_rope_scaling, "LlamaRotaryEmbedding.attention_scaling: 1.0 -> 2.0"),
        (_activation, "GELU.approximate: none -> 'none'"),
        (_one_expert, "MixtralTopKRouter.top_k: 2 -> 1"),
        (
            _one_after_the_other,
            "GPTNeoXLayer.use_parallel_residual: true -> true x 3, false in gpt_neox.layers.1",
        ),
    ],
)
def test_a_setting_that_moved_is_named(tampered: Callable[[Tamper], None], tamper: Tamper, text: str) -> None:
    model = "tiny-mixtral" if "Mixtral" in text else "tiny-gpt-neox" if "NeoX" in text else "tiny-llama"
    recorded(model)
    tampered(tamper)
    comparison = gated(quick(model), model)
    assert text in texts(comparison)
    assert verdict(comparison, "manifest")[0] == CHANGED


def test_a_config_that_a_load_changed_is_named_without_a_baseline(tampered: Callable[[Tamper], None]) -> None:
    tampered(_no_cache)
    (problem,) = judged("tiny-llama").problems
    assert problem.check == "config"
    assert problem.names == ("use_cache is False, config.json says True",)


def test_a_cache_in_32_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    update = cache_utils.DynamicLayer.update

    def in_fp32(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        found = update(self, keys.float(), values.float(), *args, **kwargs)
        return tuple(each.to(keys.dtype) for each in found)

    monkeypatch.setattr(cache_utils.DynamicLayer, "update", in_fp32)
    found = texts(gated(quick("tiny-llama")))
    assert found == ["cache.bytes_per_token: 3072 -> 6144", "cache.dtype: bfloat16 -> float32"]


def test_a_mask_that_is_ignored_shows_on_a_padded_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = modeling_llama.create_causal_mask

    def without(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return masks(*args, attention_mask=None, **kwargs)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", without)
    word, reason = verdict(gated(quick("tiny-llama")), "numbers")
    assert word == CHANGED
    assert "relative padded logits error" in reason


def test_positions_that_are_off_by_one_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaRotaryEmbedding.forward

    def shifted(self: Any, x: Any, position_ids: Any, *args: Any) -> Any:
        return forward(self, x, position_ids + 1 if position_ids.shape[-1] == 1 else position_ids, *args)

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", shifted)
    word, reason = verdict(gated(quick("tiny-llama")), "numbers")
    assert word == CHANGED
    assert "relative padded logits error" in reason


@pytest.mark.parametrize(("tamper", "layer"), [(_scaling, 2), (_activation, 1)])
def test_the_first_layer_that_differs_is_named(tampered: Callable[[Tamper], None], tamper: Tamper, layer: int) -> None:
    # Scaled attention differs the more, the more tokens there are.
    workload = Workload(1, 16, 3)
    recorded("tiny-llama", workload=workload)
    tampered(tamper)
    word, reason = verdict(gated(quick("tiny-llama", workload=workload), workload=workload), "numbers")
    assert word == CHANGED
    assert f"model.layers.{layer} is the first layer whose output differs" in reason


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rope_theta": 5e5}, "config.rope_parameters.rope_theta: 10000.0 -> 500000.0"),
        ({"rope_type": "linear", "factor": 2.0}, "config.rope_parameters.rope_type: default -> linear"),
        ({"hidden_act": "gelu"}, "config.hidden_act: silu -> gelu"),
    ],
    ids=["theta", "scaling", "activation"],
)
def test_a_default_that_the_librarys_config_changed_is_named(
    fields: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = transformers.LlamaConfig.__init__

    def other(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        own = {name: value for name, value in fields.items() if hasattr(self, name)}
        for name, value in own.items():
            setattr(self, name, value)
        self.rope_parameters = {**self.rope_parameters, **{name: fields[name] for name in fields.keys() - own}}

    monkeypatch.setattr(transformers.LlamaConfig, "__init__", other)
    # Made once in a process, and here before the change.
    monkeypatch.setattr(config_fields, "expected_config", config_fields.expected_config.__wrapped__)
    assert text in texts(gated(quick("tiny-llama")))


def test_a_pickled_file_in_place_of_the_other_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from safetensors.torch import load_file

    from pytest_llmload.worker.checkpoints.resolve import resolve

    folder = tmp_path / "both"
    shutil.copytree(checkpoint("tiny-llama").path, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    files = resolve(str(folder), tmp_path)
    baseline = record(None, [quick(files)], update=True).baseline
    loading = transformers.PreTrainedModel.from_pretrained.__func__

    def pickled(cls: type, *args: Any, **kwargs: Any) -> Any:
        return loading(cls, *args, **{**kwargs, "use_safetensors": False})

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(pickled))
    found = compare(baseline, quick(files), metrics=["manifest"])
    assert "files: model.safetensors -> pytorch_model.bin" in texts(found)


@pytest.mark.parametrize(("kept", "word"), [(0, OK), (128 << 10, REGRESSED)])
def test_memory_that_each_call_keeps(tampered: Callable[[Tamper], None], kept: int, word: str) -> None:
    held: list[Any] = []

    def tamper(model: Any) -> None:
        model.register_forward_hook(lambda *args: held.append(torch.zeros(kept, dtype=torch.uint8)))

    tampered(tamper)
    result = quick("tiny-llama")
    assert verdict(gated(result), "host.growth")[0] == word
    if kept:
        # The two forwards of a generation, and what the process of the tests gets and gives back meanwhile: some KiB.
        assert 1.9 * kept < result.metrics["host.growth"] < 2.2 * kept


def test_logits_that_differ_at_each_call_are_noted(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        model.lm_head.register_forward_hook(lambda module, args, output: output + torch.rand_like(output))

    assert not [note for note in quick("tiny-llama").notes if "repeated call" in note]
    tampered(tamper)
    (note,) = [note for note in quick("tiny-llama").notes if "repeated call" in note]
    assert "gives other logits: relative error 0." in note


def test_a_weight_that_is_a_view_of_a_larger_storage_is_named(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data = torch.cat((weight.data, weight.data))[: len(weight)]

    tampered(tamper)
    result = quick("tiny-llama")
    assert (
        "weights keep 1.00 MiB alive beyond their elements: they are views of larger storages, most of all "
        "model.layers.1.mlp.up_proj.weight"
    ) in result.notes
    assert result.metrics["host.weights"] == result.metrics["weights.logical"] + (1 << 20)


def test_two_rows_of_an_embedding_that_were_swapped(tampered: Callable[[Tamper], None]) -> None:
    def tamper(model: Any) -> None:
        weight = model.model.embed_tokens.weight.data
        weight[[5, 6]] = weight[[6, 5]]

    tampered(tamper)
    word, reason = verdict(gated(quick("tiny-llama")), "numbers")
    assert (word, reason) == (CHANGED, "model.embed_tokens.weight: bytes differ from the baseline")


def test_a_baseline_without_settings_is_compared_without_them(tampered: Callable[[Tamper], None]) -> None:
    import dataclasses

    from pytest_llmload.core.results import Numbers

    baseline = recorded("tiny-llama")
    numbers = Numbers(*(getattr(baseline.numbers, name) for name in ("logits", "logsumexp", "margin", "buffers")))
    memory = {name: value for name, value in baseline.memory.items() if "growth" not in name}
    old = dataclasses.replace(baseline, settings={}, numbers=numbers, memory=memory)
    text = codec.dumps(old)
    assert "settings" not in text
    assert "padded" not in text
    tampered(_sampled)
    result = quick("tiny-llama")
    names = ["manifest", "numbers", "host.growth", "host.weights"]
    assert compare(codec.loads(text, "old"), result, metrics=names).verdict == OK
    assert record(old, [result], update=True, metrics=names).baseline is old, "read without a rewrite"


def test_a_library_left_in_training_mode_with_a_dropout(tampered: Callable[[Tamper], None]) -> None:
    tampered(_trained)
    result = judged("tiny-gpt2")
    assert [problem.check for problem in result.problems] == ["mode"]
    assert "the library left the model in training mode" in result.problems[0].message


def test_16_bit_values_by_way_of_another_16_bit() -> None:
    """A detour is what a load in 16 bit leaves in weights that are then kept in 32 bit, and nowhere else."""
    original = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert values.equal(original, original.bfloat16().float())
    assert values.equal(original, original.half())
    assert not values.equal(original, original.bfloat16().half())
