"""Loads that do what was asked: no problem is found, and what is exact repeats."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from loads import SMALL, STRATEGIES, checkpoint, judged, load, quick

from pytest_llmload.core.job import Checkpoint
from pytest_llmload.core.metrics import METRICS, lookup
from pytest_llmload.core.results import SAMPLED_PARTS, LoadResult

MODELS = ("tiny-llama", "tiny-gpt-neox", "tiny-gpt2", "tiny-qwen3")


@functools.cache
def clean(model: str, strategy: str) -> LoadResult:
    """Return the result of a load that two tests read."""
    _fill_tables()
    return quick(model, **STRATEGIES[strategy])


@functools.cache
def _fill_tables() -> None:
    """bitsandbytes keeps its code tables from the first load on; a load process has one load only."""
    for scheme in ("nf4-dq", "nf4", "fp4"):
        judged(SMALL, **STRATEGIES[scheme])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_finds_a_problem_in_a_clean_load(strategy: str, model: str) -> None:
    result = clean(model, strategy)
    assert [(problem.check, problem.message) for problem in result.problems] == []
    assert result.outcome == "loaded"
    assert not [note for note in result.notes if "were not compared" in note and strategy != "loader"]
    assert not [note for note in result.notes if "imported during the load" in note]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_exact_figures_repeat_to_the_byte(strategy: str) -> None:
    first, second = clean("tiny-llama", strategy), quick("tiny-llama", **STRATEGIES[strategy])
    exact = [name for name in first.metrics if lookup(name).exact]
    adapter = {"weights.adapter"} if "lora" in strategy else set()
    assert set(exact) == {"host.weights", "weights.logical", "host.other_tensors"} | adapter
    assert {name: first.metrics[name] for name in exact} == {name: second.metrics[name] for name in exact}
    assert first.manifest == second.manifest
    assert first.numbers == second.numbers
    assert first.whole_bytes == second.whole_bytes == first.metrics["weights.logical"]


def test_every_figure_of_a_cpu_load_is_there_or_says_why() -> None:
    result, loaded = load("tiny-llama", quant="nf4")
    elsewhere = {name for name, metric in METRICS.items() if metric.section == "work"} | {"weights.adapter"}
    others = ("gpu.", "shard.", "server.", "served.", "kv_cache.")
    expected = {name for name in METRICS if not name.startswith(others)} - elsewhere
    assert set(result.metrics) | set(result.unavailable) == expected
    assert len(result.samples["per_token"]) == len(result.samples["ttft"]) * 2
    assert set(result.phase_peaks) == {"load", "forward", "generate"}
    assert [name for name in result.phases if name not in SAMPLED_PARTS] == [
        "import",
        "context",
        "warm_up",
        "page_cache",
        "prepare",
        "load",
        "settle",
        "applied",
        "forward",
        "logits",
        "generate",
        "timing",
        "padded_batch",
        "settings",
        "fill",
        "exercised",
    ]
    assert loaded.tokenizer is not None
    assert result.numbers.logits
    assert result.numbers.buffers


@pytest.mark.parametrize(
    ("fields", "bytes_per_weight"),
    [({}, 2.0), ({"dtype": "fp32"}, 4.0), ({"quant": "int8"}, 1.0), ({"quant": "nf4"}, 0.5)],
)
def test_weights_are_counted_to_the_byte(fields: dict[str, Any], bytes_per_weight: float) -> None:
    """Against a bare script: shapes times bytes, with the statistics that bitsandbytes adds."""
    result, loaded = load("tiny-llama", **fields)
    config = loaded.config
    hidden, ffn, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    key = config.num_key_value_heads * (hidden // config.num_attention_heads)
    rest = 4 if fields.get("dtype") == "fp32" else 2
    shapes = [(hidden, hidden)] * 2 + [(key, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    linear = layers * sum(rows * columns for rows, columns in shapes) * bytes_per_weight
    if fields.get("quant") == "nf4":
        linear += layers * sum(rows * columns // 64 * 4 + 16 * 4 for rows, columns in shapes)
    if fields.get("quant") == "int8":
        linear += layers * sum(rows * 4 for rows, _ in shapes)
    norms = (2 * layers + 1) * hidden * rest
    embeddings = config.vocab_size * hidden * rest * (1 if config.tie_word_embeddings else 2)
    buffers = {held.path: held for held in loaded.inventory.held if held.role == "buffer"}
    storages = {held.storage: held.nbytes for held in buffers.values()}
    assert result.metrics["host.weights"] == linear + norms + embeddings + sum(storages.values())


def test_generate_gives_as_many_tokens_as_asked() -> None:
    from pytest_llmload.worker.model.generation import generate

    _, loaded = load("tiny-llama", measure=False)
    told = generate(loaded, "Hello", 8)
    assert len(told["tokens"]) == 8
    assert isinstance(told["text"], str)
    assert generate(loaded, [1, 2, 3], 4)["tokens"] == generate(loaded, [1, 2, 3], 4)["tokens"]


@functools.cache
def plain_answer() -> dict[str, Any]:
    """Return what tiny-llama generates, whose checkpoint says nothing of it."""
    from pytest_llmload.worker.model.generation import generate

    return generate(load("tiny-llama", measure=False)[1], [70, 71, 72], 6)


@pytest.mark.parametrize(
    "said",
    [
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"stop_strings": ["</s>"], "max_time": 1e-4},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"is_assistant": True, "num_assistant_tokens": 5},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"eos_token_id": [1, 2], "forced_eos_token_id": 5, "repetition_penalty": 5.0},
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_a_checkpoint_says_of_generating_changes_no_token(
    tmp_path: Path, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_llmload.quantisation.quanto import Quanto
    from pytest_llmload.worker.model.generation import generate

    # A quantised cache changes tokens where its package is installed, as it should.
    monkeypatch.setattr(Quanto, "is_installed", classmethod(lambda cls: False))
    shutil.copytree(checkpoint("tiny-llama").path, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    _, loaded = load(Checkpoint(str(tmp_path), "s", "w"), measure=False)
    own = loaded.model.generation_config
    before = own.to_dict()
    assert generate(loaded, [70, 71, 72], 6) == plain_answer()
    assert loaded.model.generation_config is own
    assert own.to_dict() == before
    missing = [note for note in loaded.notes if "whose package is not installed" in note]
    assert len(missing) == (said.get("cache_implementation") == "quantized")


def test_the_cache_that_a_checkpoint_asks_for_is_used() -> None:
    from pytest_llmload.worker.model.generation import settings

    _, loaded = load("tiny-llama", measure=False)
    loaded.model.generation_config.cache_implementation = "static"
    loaded.model.generation_config.top_k = 3
    assert settings(loaded, 4).cache_implementation == "static"
    assert settings(loaded, 4).eos_token_id == loaded.model.generation_config.eos_token_id
    loaded.model.generation_config.use_cache = False
    assert settings(loaded, 4).use_cache is False


def test_a_load_that_only_serves_takes_no_figure() -> None:
    result, loaded = load("tiny-llama", measure=False)
    assert result.metrics == {}
    assert result.manifest == []
    assert loaded.model is not None
