"""The tensor_parallel package over CPU devices: clean loads of each architecture, and planted faults."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loads import CACHE, checkpoint, load, quick

pytest.importorskip("tensor_parallel")

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.results import LoadResult, Problem
from pytest_llmload.worker.checkpoints.architecture import meta_model
from pytest_llmload.worker.checkpoints.resolve import resolve
from pytest_llmload.worker.model.loaded import Loaded
from pytest_llmload.worker.model.relative_error import relative_error
from pytest_llmload.worker.parallel import package_config, reference, sharded_model
from pytest_llmload.worker.parallel.planned import rank_sizes
from pytest_llmload.worker.parallel.shard_plan import ShardPlan, divided_axis, rows

_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Architectures that no preset has.
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 8},
    "gemma": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_scaling": None, "head_dim": 32},
}
PRESETS = ("tiny-llama", "tiny-gpt-neox", "tiny-qwen3")
FIVE = int(transformers.__version__.partition(".")[0]) >= 5
#: transformers 4 plans no split of the output head.
OFF = 0.01 if FIVE else 0.08
needs_fused_experts = pytest.mark.skipif(not FIVE, reason="transformers 5 fuses experts, which is what is split")


@functools.cache
def other(name: str) -> Checkpoint:
    folder = CACHE / "halved" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**_SMALL, **OTHERS[name]}))
    return resolve(f"random:{folder}", CACHE)


def model(name: str) -> str | Checkpoint:
    return other(name) if name in OTHERS else name


def checkpoint_of(name: str) -> Checkpoint:
    return other(name) if name in OTHERS else checkpoint(name)


def parallel(name: str, world_size: int = 2, **fields: Any) -> LoadResult:
    return quick(model(name), strategy="tensor_parallel", world_size=world_size, **fields)


def live(name: str, **fields: Any) -> Loaded:
    return load(model(name), measure=False, **fields)[1]


def problems(result: LoadResult, check: str) -> list[Problem]:
    assert result.outcome == "not_applied"
    return [problem for problem in result.problems if problem.check == check]


@pytest.mark.parametrize("name", [*PRESETS, pytest.param("tiny-mixtral", marks=needs_fused_experts), *OTHERS])
def test_each_architecture_is_halved_and_gives_the_same_output(name: str) -> None:
    result = parallel(name)
    assert [(problem.check, problem.message) for problem in result.problems] == []
    whole = meta_model(Path(checkpoint_of(name).path), dtype=torch.bfloat16)
    planned = sum(rank_sizes(whole, package_config.package_config(whole, 2)[1], 2))
    for rank in range(2):
        assert result.metrics[f"shard.{rank}.logical"] == planned
        assert result.metrics[f"shard.{rank}.logical"] / result.whole_bytes == pytest.approx(0.5, abs=OFF)
    assert any("each holds 50.0% of the sharded weights" in note for note in result.notes)
    assert any(note.startswith("logits are ") and "2 x its own error" in note for note in result.notes)
    assert not [note for note in result.notes if "not compared" in note or "imported during the load" in note]


@pytest.mark.parametrize(("world_size", "attn"), [(4, "eager"), (2, "sdpa")])
def test_more_shards_and_each_attention(world_size: int, attn: str) -> None:
    result = parallel("tiny-llama", world_size, dtype="fp32", attn=attn)
    assert result.problems == []
    shares = [result.metrics[f"shard.{rank}.logical"] / result.whole_bytes for rank in range(world_size)]
    assert shares == pytest.approx([1 / world_size] * world_size, abs=OFF)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt-neox", "tiny-mixtral", "gemma"])
def test_generating_with_the_cache_is_what_the_whole_model_generates(name: str) -> None:
    whole = live(name, dtype="fp32").model
    sharded = live(name, dtype="fp32", strategy="tensor_parallel", world_size=2).model
    ids = torch.arange(64, 64 + 24).reshape(2, 12)
    # One prompt is shorter: positions come from the mask.
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for options in ({}, {"num_beams": 2}):
        told = [
            one.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=8, max_new_tokens=8, **options)
            for one in (whole, sharded)
        ]
        assert told[0].tolist() == told[1].tolist(), options


def test_a_decoding_loop_of_ones_own_keeps_a_cache_for_each_rank() -> None:
    whole = live("tiny-llama", dtype="fp32").model
    sharded = live("tiny-llama", dtype="fp32", strategy="tensor_parallel", world_size=2).model
    ids = torch.arange(64, 80).reshape(1, 16)
    with torch.no_grad():
        expected = whole(ids).logits[:, -1]
        cache = sharded(ids[:, :10], use_cache=True).past_key_values
        found = sharded(ids[:, 10:], past_key_values=cache).logits[:, -1]
        assert cache.get_seq_length() == 16
        with pytest.raises(TypeError, match="a cache for each rank"):
            sharded(ids, past_key_values=whole(ids).past_key_values)
    assert torch.allclose(expected, found, atol=1e-3)


# Loads that cannot be


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tiny-gpt2", {}, r"keeps no tensor-parallel plan \(tp_plan\) for GPT2LMHeadModel \(model type 'gpt2'\)"),
        ("tiny-llama", {"world_size": 3}, "num_attention_heads is 8, which does not divide by world_size=3"),
        ("tiny-llama", {"world_size": 8}, "num_key_value_heads is 4, which does not divide by world_size=8"),
    ],
)
def test_what_cannot_be_sharded_is_one_clear_sentence(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel(name, **fields)


def test_a_style_without_a_counterpart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        package_config, "model_plan", lambda model: ShardPlan({"model.layers.*.self_attn.q_proj": "mla_kv_a_proj"})
    )
    with pytest.raises(ValueError, match="no counterpart of style 'mla_kv_a_proj', planned for model"):
        parallel("tiny-llama")


# Planted faults


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Has a function change the package's Config of every load."""

    def plant(change: Callable[[Any], None]) -> None:
        original = package_config.package_config

        def changed(model: Any, world_size: int) -> Any:
            config, plan = original(model, world_size)
            change(config)
            return config, plan

        monkeypatch.setattr(sharded_model, "package_config", changed)

    return plant


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """Has a function change the sharded model of every load."""

    def plant(tamper: Callable[[Any], None]) -> None:
        original = sharded_model.shard

        def changed(model: Any, devices: list[str]) -> Any:
            sharded, shards = original(model, devices)
            with torch.no_grad():
                tamper(sharded)
            return sharded, shards

        monkeypatch.setattr(sharded_model, "shard", changed)

    return plant


def _without(rules: dict[Any, Any], part: str) -> None:
    for pattern in [pattern for pattern in rules if part in pattern.pattern]:
        del rules[pattern]


def test_every_shard_holding_the_whole_model(rules: Callable[..., None]) -> None:
    def nothing(config: Any) -> None:
        for table in (config.state_rules, config.input_rules, config.output_rules):
            table.clear()

    rules(nothing)
    result = parallel("tiny-llama")
    messages = [problem.message for problem in problems(result, "shards")]
    assert len(messages) == 2
    planned = 23 if FIVE else 22
    assert messages[1].startswith(f"rank 1 holds the whole model (15.51 MiB): none of {planned} weights is sharded")
    assert result.metrics["shard.1.logical"] == result.whole_bytes


def test_one_weight_left_whole(rules: Callable[..., None]) -> None:
    def unsplit(config: Any) -> None:
        for table in (config.state_rules, config.input_rules, config.output_rules):
            _without(table, "embed_tokens")

    rules(unsplit)
    found = problems(parallel("tiny-llama"), "shards")
    assert [problem.message for problem in found] == [
        f"rank {rank} holds 1 weight (1.00 MiB) whole, of which the plan gives it 50.0% of each" for rank in range(2)
    ]
    assert found[0].names == ("rank0.model.embed_tokens.weight (1.00 MiB)",)


def test_a_shard_left_out(tampered: Callable[..., None]) -> None:
    def drop(model: Any) -> None:
        del model.rank1

    tampered(drop)
    (problem,) = problems(parallel("tiny-llama"), "shards")
    assert problem.message == "1 of 2 shards is there"
    assert problem.names == ("rank 1",)


def test_a_rank_with_another_ranks_shard(tampered: Callable[..., None]) -> None:
    def copy(model: Any) -> None:
        model.rank1.model.layers[2].mlp.down_proj.weight.copy_(model.rank0.model.layers[2].mlp.down_proj.weight)

    tampered(copy)
    result = parallel("tiny-llama")
    (problem,) = problems(result, "shards")
    assert "of rank 1's 30 tensors are those of rank 0" in problem.message
    assert problem.names[0].startswith("rank1.model.layers.2.mlp.down_proj.tp_wrapped_module.weight (")
    assert problems(result, "output")


@needs_fused_experts
def test_fused_experts_of_another_rank(tampered: Callable[..., None]) -> None:
    def copy(model: Any) -> None:
        model.rank1.model.layers[0].mlp.experts.gate_up_proj.copy_(model.rank0.model.layers[0].mlp.experts.gate_up_proj)

    tampered(copy)
    (problem,) = problems(parallel("tiny-mixtral"), "shards")
    assert "are those of rank 0" in problem.message


def test_values_that_are_in_no_part_of_the_checkpoint(tampered: Callable[..., None]) -> None:
    def zero(model: Any) -> None:
        model.rank0.model.norm.weight.zero_()

    tampered(zero)
    (problem,) = problems(parallel("tiny-llama"), "shards")
    assert "the values of 1 of rank 0's 30 tensors are not the checkpoint's" in problem.message


def test_a_bias_that_every_rank_adds(rules: Callable[..., None]) -> None:
    """Its values are the file's, and yet they are wrong: the sum over two ranks counts them twice."""
    rules(lambda config: _without(config.state_rules, r"dense\.bias"))
    result = parallel("tiny-gpt-neox")
    assert "the values of 4 of rank 0's 52 tensors are not the checkpoint's" in problems(result, "shards")[0].message


def test_a_sum_over_the_ranks_that_is_not_made(rules: Callable[..., None]) -> None:
    """Every shard is as it should be; only the output tells."""
    rules(lambda config: _without(config.output_rules, "down_proj"))
    result = parallel("tiny-llama")
    (problem,) = result.problems
    assert problem.check == "output"
    assert problem.message.startswith("not the whole model's output: logits on the same tokens are ")


def test_greedy_tokens_are_compared_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "generate_workload", lambda loaded: torch.tensor([[1, 2, 3]]))
    (problem,) = parallel("tiny-llama", dtype="fp32").problems
    assert problem.check == "output"
    assert problem.message.endswith("not [[1, 2, 3]]")


def test_in_16_bit_the_whole_model_generates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "generate_workload", lambda loaded: pytest.fail("generated"))
    assert parallel("tiny-llama", dtype="bf16").problems == []


def test_no_room_for_the_whole_model_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "available", lambda: 1 << 20)
    result = parallel("tiny-llama")
    assert result.problems == []
    assert "output was not compared: no device has room for the whole model in fp32" in result.notes


def test_a_whole_model_that_runs_out_of_memory_is_said_and_is_no_fault_of_the_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(loaded: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.34 GiB")

    monkeypatch.setattr(reference, "first_forward", forward)
    result = parallel("tiny-llama")
    assert (result.outcome, result.problems) == ("loaded", [])
    assert "output was not compared: the whole model ran out of memory beside this one on the host" in result.notes


# Parts


def test_relative_errors_of_nan_and_other_shapes_are_infinite() -> None:
    one = torch.ones(2, 3)
    assert relative_error(one, one) == 0
    assert relative_error(one * float("nan"), one) == float("inf")
    assert relative_error(one[:1], one) == float("inf")


def test_rows_of_a_rank() -> None:
    assert list(rows(6, 3, 2, 1)) == [[3, 4, 5]]
    # The last part is the shorter one.
    assert list(rows(5, 1, 3, 2)) == [[4]]
    assert list(rows(7, 3, 2, 1)) == [[4, 5, 6]]
    assert list(rows(7, 1, 4, 3)) == [[6]]
    # Two packed halves, or one run.
    assert list(rows(8, 4, 2, 0)) == [[0, 1, 2, 3], [0, 1, 4, 5]]
    assert list(rows(8, 5, 2, 0)) == []


def test_the_axis_along_which_a_tensor_is_divided() -> None:
    assert divided_axis((4, 3), (4, 6)) == 1
    assert divided_axis((4, 6), (4, 6)) is None
    for held in ((2, 3), (12,)):
        with pytest.raises(ValueError, match="is no part of"):
            divided_axis(held, (4, 6))


def test_a_plan_names_modules_and_parameters() -> None:
    plan = ShardPlan(
        {"model.layers.*.mlp.down": "rowwise", "model.layers.*.experts.up": "packed_colwise", "norm": "replicate"}
    )
    assert plan.style("model.layers.12.mlp.down.weight") == "rowwise"
    assert plan.shards("model.layers.12.mlp.down.weight")
    assert not plan.shards("model.layers.12.mlp.down.bias")
    assert plan.shards("model.layers.0.experts.up")
    assert not plan.shards("norm.weight")
    assert plan.style("model.layers.x.mlp.down.weight") is None
