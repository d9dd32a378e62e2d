"""``llmload plan``: caches as transformers keeps them, memory as it was measured on GPUs, and nothing read or built."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pytest_llmload.baselines.codec import loads
from pytest_llmload.baselines.extrapolation import Extrapolated, extrapolate
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.store import Store
from pytest_llmload.cli import main, plan
from pytest_llmload.cli.measured_cuts import at, lines, read_cuts
from pytest_llmload.cli.refused import CommandRefused
from pytest_llmload.core.job import Adapter, Checkpoint, Device, Gpu, Job
from pytest_llmload.core.presets import PRESETS
from pytest_llmload.core.spec import LoadSpec, Workload
from pytest_llmload.process import planning
from pytest_llmload.process.job_strategies import plan as planned_metrics
from pytest_llmload.strategies.builtin import BUILTIN
from pytest_llmload.worker.parallel.planned import parallel_ways
from pytest_llmload.worker.planning.cache import FULL, GROUPED, LATENT, LINEAR, SLIDING, UNKNOWN, cache_of
from pytest_llmload.worker.planning.overview import outline, overview

ROOT = Path(__file__).parents[2]
H100 = Gpu("GPU-0", "NVIDIA H100 80GB HBM3", 85_029_158_912, (9, 0))
H200 = Gpu("GPU-0", "NVIDIA H200", 150_754_820_096, (9, 0))
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {
    **SMALL, "q_lora_rank": 16, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 4,
    "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
NEXT = {
    **SMALL, "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
CACHES = {
    "full": ("llama", SMALL, {FULL: 4}),
    "grouped": ("llama", {**SMALL, "num_key_value_heads": 2}, {GROUPED: 4}),
    "sliding": ("mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": 8}, {SLIDING: 4}),
    "mixed": ("gemma3_text", {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
                              "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, {SLIDING: 3, GROUPED: 1}),
    "latent": ("deepseek_v3", DEEPSEEK, {LATENT: 4}),
    "linear": ("qwen3_next", NEXT, {LINEAR: 3, GROUPED: 1}),
    "other": ("gpt_neox", SMALL, {FULL: 4}),
}  # fmt: skip


def tensors(value: object, seen: set[int]) -> Iterable[torch.Tensor]:
    """Every tensor that a cache holds, however its release arranges them."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("transformers"):
        yield from tensors(vars(value), seen)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("tokens", [5, 24])
def test_a_cache_is_what_transformers_keeps(name: str, tokens: int) -> None:
    model_type, fields, kinds = CACHES[name]
    config = transformers.AutoConfig.for_model(model_type, **fields)
    cache = cache_of(config, 2)
    assert cache.kinds == kinds
    torch.manual_seed(0)
    # Some classes of 4.57 keep nothing while they are trained.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        kept = model(torch.ones(3, tokens, dtype=torch.long), use_cache=True).past_key_values
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors(kept, set()) if tensor.numel() > 8)
    assert cache.bytes(3, tokens) == held


def test_a_layer_of_an_unknown_kind_is_said_and_not_counted() -> None:
    config = transformers.AutoConfig.for_model("llama", **SMALL)
    config.layer_types = ["full_attention"] * 3 + ["telepathy"]
    cache = cache_of(config, 2)
    assert cache.kinds == {FULL: 3, UNKNOWN: 1}
    assert cache.layers[3].bytes(100, 2) == 0


# --- every committed baseline ----------------------------------------------------------------------------------------


def committed() -> list[Path]:
    """The baselines of loads that are planned, measured on H100 and H200."""
    found = []
    for path in sorted((ROOT / "baselines").glob("*/nvidia-h*/*.json")):
        baseline = loads(path.read_text(), str(path))
        if BUILTIN[baseline.spec.get("strategy", "single")].placement is not None and path.parts[-3] in PRESETS:
            found.append(path)
    return found


@pytest.mark.parametrize("path", committed(), ids=lambda path: "/".join(path.parts[-3:]))
def test_what_is_planned_was_measured_within_one_percent(path: Path, tmp_path: Path) -> None:
    baseline = loads(path.read_text(), str(path))
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[path.parts[-3]]))
    fields: dict[str, Any] = {
        name: tuple(map(tuple, value)) if name == "max_memory" else value for name, value in baseline.spec.items()
    }
    spec = LoadSpec(model="m", name="m", **fields)
    one = H200 if "h200" in path.parts[-2] else H100
    gpus = tuple(Gpu(**{**asdict(one), "index": index}) for index in range(spec.gpu_count))
    job = Job(spec, Device("cuda", path.parts[-2], gpus), Checkpoint(str(tmp_path), "", ""))
    if spec.adapter:
        pytest.importorskip("peft")
        from pytest_llmload.worker.checkpoints.random_adapter import resolve_adapter

        folder = resolve_adapter("random", job.checkpoint, tmp_path / "cache")
        job = Job(spec, job.device, job.checkpoint, Adapter(str(folder), ""))
    found = planned_metrics(job)
    names = [name for name in found if name.endswith(".settled") and name in baseline.memory]
    # Which GPU a block goes to is inferred by transformers, by rules that its releases change for 4-bit weights.
    is_same = baseline.environment["transformers"].split(".")[:2] == transformers.__version__.split(".")[:2]
    if spec.strategy != "single" and spec.quant == "nf4" and not is_same:
        names = [name for name in names if not name.split(".")[1].isdigit()]
    assert "gpu.settled" in names
    for name in (*names, "host.weights", "gpu.weights"):
        assert found[name] == pytest.approx(baseline.memory[name], rel=0.01), name


# --- the command -----------------------------------------------------------------------------------------------------


def test_nothing_is_built_for_a_random_model(tmp_path: Path) -> None:
    directory = outline("random:polyglot-ko-12.8b", tmp_path, trust_remote_code=False)
    assert [path.name for path in directory.iterdir()] == ["config.json"]


def test_what_fits_is_found_to_the_token(tmp_path: Path) -> None:
    directory = outline("random:llama-7b", tmp_path, trust_remote_code=False)
    gpu = Gpu("a", "24GiB", 24 << 30, (8, 0))
    found = overview("random:llama-7b", directory, (gpu,), Workload.parse("4x2048+64"), planning.ways((gpu,)))
    ways = {way.slug: way for way in found.ways}
    assert not ways["fp32"].fits
    assert (ways["fp32"].tokens, ways["fp32"].batch) == (0, 0)
    assert ways["none"].fits
    assert ways["nf4"].tokens > ways["int8"].tokens > ways["none"].tokens > 4096
    assert ways["none"].batch >= 4
    assert ways["offload"].figures["disk"] > 0
    assert "model.layers" in ways["offload"].places["disk"]
    assert found.cache_per_token == 32 * 2 * 4096 * 2


def answer(**fields: Any) -> dict[str, Any]:
    question = {
        "model": "random:tiny-llama",
        "gpus": [asdict(H100)],
        "workload": "1x128+32",
        "trust_remote_code": False,
        "measure": True,
        "layers": None,
        "cuts": [],
        "measured": {},
        **fields,
    }
    return planning.answer(question)


def test_the_table_says_what_the_plan_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = answer(gpus=[asdict(H100), asdict(H100)])
    assert told["stored"] == 0, "there are no weights to read"
    monkeypatch.setattr(plan, "ask", lambda *_, **__: told)
    assert main(["plan", "random:tiny-llama", "--gpu", "h100", "--bandwidth", "1GiB", "--places"]) == 0
    out = capsys.readouterr().out
    for text in ("llama, ", "3 grouped layers", "nf4-dq", "auto-nf4", "from ", "offload: disk: model.layers"):
        assert text in out
    assert main(["plan", "random:tiny-llama", "--gpu", "24GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overview"]["model_type"] == "llama"


def test_the_speed_of_the_disk_is_measured_where_weights_are(tmp_path: Path) -> None:
    from pytest_llmload.worker.checkpoints.resolve import resolve

    checkpoint = resolve("random:tiny-llama", tmp_path)
    told = answer(model=checkpoint.path)
    assert told["bandwidth"] > 1 << 20
    assert told["stored"] == pytest.approx(checkpoint.bytes, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "24"], "is not a size"),
        (["--workload", "1x2"], "is not a workload"),
        (["--gpu", "24GiB", "--bandwidth", "fast"], "is not a size"),
    ],
)
def test_what_is_wrong_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["plan", "random:tiny-llama", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_plans_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "random:polyglot-ko-12.8b", "--gpu", "8GiB"]) == 0
    out = capsys.readouterr().out
    assert "nf4-dq" in out
    assert main(["plan", "random:nonsense", "--gpu", "8GiB"]) == 2
    assert "nonsense" in capsys.readouterr().err


# --- cuts ------------------------------------------------------------------------------------------------------------


def test_a_cut_is_planned_as_it_would_be_loaded(tmp_path: Path) -> None:
    from pytest_llmload.worker.checkpoints.resolve import resolve

    cut = resolve("random:tiny-llama", tmp_path, layers=2)
    whole = resolve("random:tiny-llama", tmp_path)
    for model in ("random:tiny-llama", whole.path):
        told = answer(model=model, layers=2, cuts=[1], measured={"none": {}, "nf4": {"quant": "nf4"}})
        assert told["layers"] == 2
        assert told["overview"]["cache_kinds"] == {"grouped": 2}
        assert told["overview"]["ways"] == answer(model=cut.path)["overview"]["ways"]
        assert told["weights"]["none"].keys() == {1, 2}
        assert told["weights"]["nf4"][2] < told["weights"]["none"][2]
    assert told["stored"] == pytest.approx(cut.bytes, rel=0.01)


def baseline_of(**memory: float) -> Baseline:
    return Baseline("shape", "weights", {}, "1x16+4", memory=memory)


def test_a_line_through_two_cuts_leads_to_the_whole() -> None:
    cuts = {2: baseline_of(**{"host.weights": 14, "host.peak": 20}), 4: baseline_of(**{"host.weights": 24})}
    alike = {count: 100 + 7 * count for count in (2, 3, 4, 8)}
    assert extrapolate(cuts, alike, 8) == [Extrapolated("host.weights", 44, exact=True)]
    bent = {**cuts, 3: baseline_of(**{"host.weights": 20})}
    assert extrapolate(bent, alike, 8) == [Extrapolated("host.weights", 44, exact=False)]


def test_layers_that_are_not_alike_are_followed_by_the_plan() -> None:
    cuts = {2: baseline_of(**{"host.weights": 14.0}), 4: baseline_of(**{"host.weights": 24.0})}
    # A planned byte is a measured byte, so the plan's step from 4 to 8 layers is the measured one.
    assert extrapolate(cuts, {2: 10, 4: 20, 8: 60}, 8) == [Extrapolated("host.weights", 64, exact=True)]
    # A planned byte is half a measured byte: the kinds may differ in that, so the figure is about.
    assert extrapolate(cuts, {2: 10, 4: 15, 8: 35}, 8) == [Extrapolated("host.weights", 64, exact=False)]


def _given(measured: Baseline, _: Baseline | None) -> Baseline:
    return measured


def test_cuts_of_a_mixture_of_experts_tell_the_whole(tmp_path: Path) -> None:
    config = {
        **DEEPSEEK,
        "num_hidden_layers": 8,
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    counts = [1, 2, 3]
    planned = answer(model=f"random:{tmp_path}", cuts=counts, measured={"none": {}})["weights"]
    # Four layers are dense and four are experts; a cut to N has N of each, so three cuts lie on a line with the whole.
    steps = {planned["none"][count + 1] - planned["none"][count] for count in (1, 2)}
    assert len(steps) == 1
    assert planned["none"][8] == planned["none"][3] + steps.pop()
    store = Store(tmp_path / "baselines")
    for layers in counts:
        measured = baseline_of(**{"host.weights": planned["none"][layers] + 64.0})
        store.update(store.path_for(f"m@{layers}-layers", "cpu-x86_64", "none"), partial(_given, measured))
    cuts = read_cuts("m", [str(tmp_path / "baselines")])
    [row] = at(cuts, 8, planned)
    assert row["metrics"]["host.weights"] == {"value": planned["none"][8] + 64.0, "exact": True}
    noise = {"host.growth": {"value": -160.0, "exact": False}, "host.file": {"value": 9.0, "exact": True}}
    peak = {"host.peak": {"value": 3.0 * (1 << 20), "exact": False}}
    told = lines([{**row, "metrics": {"host.weights": {"value": 64.0, "exact": True}, **noise, **peak}}], 8)
    assert told[1:] == ["  host.weights  exactly  64 B", "  host.peak     about    3.00 MiB"]
    with pytest.raises(CommandRefused, match="these cuts do not tell what a layer adds"):
        at(cuts, 8, {"none": dict.fromkeys((1, 2, 3, 8), 5)})
    (tmp_path / "one").mkdir()
    (tmp_path / "baselines" / "m@2-layers").rename(tmp_path / "one" / "m@2-layers")
    with pytest.raises(CommandRefused, match=r"measures only cuts to 2 layers of m: extrapolating needs"):
        read_cuts("m", [str(tmp_path / "one")])


# --- ranks -----------------------------------------------------------------------------------------------------------


def split_baselines() -> list[Path]:
    """The baselines of loads over two ranks, measured on H100 and H200."""
    return sorted((ROOT / "baselines").glob("*/nvidia-h*-x2/t*_p*-x2-fp16.json"))


@pytest.mark.parametrize("path", split_baselines(), ids=lambda path: "/".join(path.parts[-3:]))
def test_what_is_planned_for_each_rank_was_measured(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensor_parallel")
    baseline = loads(path.read_text(), str(path))
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[path.parts[-3]]))
    ways = parallel_ways("m", tmp_path, (H100, H100), Workload.parse(baseline.workload))
    [figures] = [way.figures for way in ways if way.slug == f"{baseline.spec['strategy']}-x2"]
    config = PRESETS[path.parts[-3]]
    # transformers' plan of Llama divides the embedding from 5.2x on; the baseline was recorded before.
    is_same = baseline.environment["transformers"].split(".")[:2] == transformers.__version__.split(".")[:2]
    is_whole = (baseline.spec["strategy"], config["model_type"]) == ("tp_plan", "llama") and not is_same
    later = config["vocab_size"] * config["hidden_size"] if is_whole else 0
    for rank in (0, 1):
        for name, off in (("weights", 1e-6), ("settled", 0.001)):
            measured = baseline.memory[f"gpu.{rank}.{name}"] - later
            assert figures[f"gpu.{rank}.{name}"] == pytest.approx(measured, rel=off)


def test_every_committed_baseline_is_held_against_the_plan() -> None:
    """What is left out is placed by a server or by DeepSpeed, by rules of their own."""
    left = set((ROOT / "baselines").glob("*/nvidia-h*/*.json")) - {*committed(), *split_baselines()}
    assert {loads(path.read_text(), "").spec["strategy"] for path in left} == {"deepspeed", "served"}


def test_what_cannot_be_planned_for_ranks_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny-gpt2"]))
    ways = {way.slug: way.problem for way in parallel_ways("m", tmp_path, (H100, H100), Workload.parse("1x128+32"))}
    assert "keeps no tensor-parallel plan (tp_plan) for GPT2LMHeadModel" in ways["tp_plan-x2"]
    assert "by rules of its own" in ways["deepspeed"]
    assert "its weights alone are those of 'none'" in ways["served"]
    one = {way.slug: way.problem for way in parallel_ways("m", tmp_path, (H100,), Workload.parse("1x128+32"))}
    assert one["tp_plan-x2"] == "it needs two GPUs or more: name them with --gpu"
