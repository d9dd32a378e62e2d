"""One frozen spec for every way of asking for a load."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.baselines.codec import dumps, loads
from pytest_llmload.baselines.store import Store
from pytest_llmload.core.portable import portable_spec
from pytest_llmload.core.spec import LoadSpec, Workload


def spec(**changes: Any) -> LoadSpec:
    return LoadSpec(**{"model": "random:tiny-llama", "name": "tiny-llama", **changes})


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({}, "none"),
        ({"quant": "nf4"}, "nf4"),
        ({"quant": "nf4", "double_quant": True, "compute_dtype": "bf16", "adapter": "random"}, "nf4-dq-bf16+lora"),
        ({"dtype": "fp16"}, "fp16"),
        ({"quant": "int8", "dtype": "fp16"}, "int8+fp16"),
        ({"strategy": "tensor_parallel", "world_size": 2}, "tensor_parallel-x2"),
        ({"strategy": "auto", "dtype": "bf16", "attn": "eager"}, "auto-bf16+eager"),
        ({"adapter": "random", "adapter_merged": True, "adapter_via": "load_adapter"}, "none+lora-merged-load_adapter"),
        ({"workload": Workload(4, 2048, 64), "own_workload": True}, "none+w4x2048-64"),
        ({"workload": Workload(4, 2048, 64)}, "none"),
    ],
)
def test_slugs_are_the_names_of_baseline_files(changes: dict[str, Any], slug: str) -> None:
    assert spec(**changes).slug == slug


#: Ways of loading that are different loads, pairwise.
DIFFERENT = [
    {},
    {"quant": "nf4"},
    {"quant": "nf4", "double_quant": True},
    {"quant": "nf4", "compute_dtype": "bf16"},
    {"quant": "nf4", "dtype": "bf16"},
    {"quant": "fp4"},
    {"dtype": "bf16"},
    {"strategy": "max_memory", "max_memory": (("0", 10), ("cpu", 30))},
    {"strategy": "max_memory", "max_memory": (("0", 11), ("cpu", 30))},
    {"skip_modules": ("lm_head",)},
    {"device_map": '{"":0}'},
    {"adapter": "random"},
    {"adapter": "org/adapter"},
    {"adapter": "random", "adapter_merged": True},
    {"target": "ourapp.serving:load_model", "strategy": "loader"},
    {"options": (("low_cpu_mem_usage", "true"),)},
    {"env": (("HF_DEACTIVATE_ASYNC_LOAD", "1"),)},
    {"attn": "sdpa"},
    {"attn": "kernels-community/flash-attn"},
    {"attn": "kernels-community/flash-attn3"},
    {"auto_class": "AutoModelForSequenceClassification"},
]


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(DIFFERENT, 2)))
def test_different_loads_never_share_a_file_or_an_identity(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert spec(**one).slug != spec(**other).slug
    assert spec(**one).identity() != spec(**other).identity()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn": "kernels-community/flash-attn"},
        {"attn": "org/kernel@v1:function"},
        {"attn": "../../elsewhere"},
        {"target": "x" * 300 + ":load"},
        {"target": "a/b:load"},
        {"attn": "a" * 300, "target": "b" * 300, "adapter": "c" * 300, "auto_class": "d/e"},
    ],
)
def test_a_slug_is_one_file_name_whatever_is_asked_for(tmp_path: Path, changes: dict[str, Any]) -> None:
    slug = spec(strategy="loader", **changes).slug
    assert Store(tmp_path).path_for("m", "d", slug).parent == tmp_path / "m" / "d"
    assert len(slug) < 200
    assert slug != spec(strategy="loader").slug


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"options": (("offload_folder", '"/home/joe/off"'),)}, {"options": (("offload_folder", '"/srv/ci/off"'),)}),
        ({"env": (("HF_HOME", "/home/joe/hf"),)}, {"env": (("HF_HOME", "/srv/hf"),)}),
        ({"env": (("HF_TOKEN", "one"),)}, {"env": (("HF_TOKEN", "two"),)}),
        ({"adapter": "/home/joe/adapter"}, {"adapter": "/srv/adapter"}),
    ],
)
def test_every_machine_finds_the_same_file(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert spec(**one).slug == spec(**other).slug != spec().slug


def test_what_only_relaxes_a_check_is_no_other_variant() -> None:
    kept = (("low_cpu_mem_usage", "true"),)
    for options in ((), kept):
        relaxed = spec(options=(("keys_ok", '["mtp.*"]'), *options))
        assert relaxed.slug == spec(options=options).slug
        assert relaxed.identity() == spec(options=options).identity()
    assert spec(options=kept).slug != spec().slug


COMMITTED = sorted(Path(__file__).parents[2].glob("baselines/*/*/*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_committed_baselines_keep_their_names_and_bytes(path: Path) -> None:
    text = path.read_text()
    baseline = loads(text, str(path))
    recorded = LoadSpec.from_json({**spec().to_json(), **baseline.spec})
    assert recorded.slug == path.stem
    assert portable_spec(recorded.identity()) == baseline.spec
    assert dumps(baseline) == text


def test_there_are_committed_baselines() -> None:
    assert COMMITTED


def test_checks_and_the_models_place_are_no_part_of_the_identity() -> None:
    checked = spec(quant="nf4", dense_ok=("*.experts.*",), model="/elsewhere/tiny-llama", name="prod")
    assert checked.identity() == spec(quant="nf4").identity()
    assert checked.slug == spec(quant="nf4").slug


@pytest.mark.parametrize("changes", DIFFERENT)
def test_a_spec_survives_json(changes: dict[str, Any]) -> None:
    original = spec(**changes, workload=Workload(2, 64, 8))
    back = LoadSpec.from_json(json.loads(json.dumps(original.to_json())))
    assert back == original
    assert hash(back) == hash(original)


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().quant = "nf4"  # type: ignore[misc]


def test_options_are_decoded() -> None:
    assert spec(options=(("keys_ok", '["mtp.*"]'),)).option("keys_ok") == ["mtp.*"]
    assert spec().option("keys_ok", []) == []


def test_a_workload_is_read_and_written_alike() -> None:
    assert Workload.parse("4x2048+64") == Workload(4, 2048, 64)
    assert str(Workload.parse("1x128+32")) == "1x128+32"


@pytest.mark.parametrize("text", ["", "4x2048", "0x128+32", "1x128+0", "1 x 128 + 32", "axb+c", 4, None])
def test_what_is_no_workload_says_what_to_write(text: int | str | None) -> None:
    with pytest.raises(ValueError, match="is not a workload: write BATCHxPROMPT\\+NEW"):
        Workload.parse(text)
