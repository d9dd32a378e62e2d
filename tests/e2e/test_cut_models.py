"""``--llm-layers``: a gate on a model's first layers, apart from the whole model's, and what it tells of the whole."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes  # noqa: F401 - pytester unloads what a test was the first to import, and these load once only
import pytest
import transformers.modeling_utils  # noqa: F401

from pytest_llmload.cli import main, plan
from pytest_llmload.core.presets import PRESETS

Project = Callable[..., pytest.RunResult]

TEST = """
    def test_memory(llm, memory_baseline):
        memory_baseline.check(llm)
"""


@pytest.fixture
def eight(pytester: pytest.Pytester) -> str:
    """Return the option that loads a small model of eight layers."""
    pytester.makepyfile(TEST)
    (pytester.path / "deep.json").write_text(json.dumps({**PRESETS["tiny-llama"], "num_hidden_layers": 8}))
    return "--llm-model=deep=random:deep.json"


OPTIONS = ("--llm-device=cpu", "--llm-workload=1x8+3", "--llm-record-repeats=1")


@pytest.fixture
def _planned_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan in this process, which has imported torch and transformers, in place of a process of its own."""
    from pytest_llmload.process import planning

    def run(command: list[str], *, input: str, **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, json.dumps(planning.answer(json.loads(input))), "")

    stand_in = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(plan, "subprocess", stand_in)


def recorded(root: Path, name: str) -> dict[str, Any]:
    [file] = (root / "baselines" / name).glob("cpu-*/none.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.usefixtures("_planned_here")
def test_weights_of_two_cuts_tell_those_of_the_whole_to_the_byte(
    pytester: pytest.Pytester, project: Project, eight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = (*OPTIONS, eight, "--llm-record-missing")
    for layers in (2, 4):
        project(*record, f"--llm-layers={layers}", fast=False).assert_outcomes(passed=1)
    project(*record, fast=False).assert_outcomes(passed=1)
    assert {path.name for path in (pytester.path / "baselines").iterdir()} == {
        "deep", "deep@2-layers", "deep@4-layers",
    }  # fmt: skip
    question = ["plan", "deep=random:deep.json", "--gpu", "8GiB", "--measured", "baselines"]
    capsys.readouterr()
    assert main([*question, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["measured"]
    assert row["cuts"] == [2, 4]
    truth = recorded(pytester.path, "deep")["memory"]
    for name in ("host.weights", "weights.logical"):
        assert row["metrics"][name] == {"value": truth[name], "exact": True}
    assert not row["metrics"]["host.peak"]["exact"]
    assert main(question) == 0
    assert "none on cpu-x86_64, all 8 layers as cuts to 2, 4 tell:" in capsys.readouterr().out


@pytest.mark.usefixtures("_planned_here")
def test_two_cuts_of_a_mixture_of_experts_tell_its_weights_to_the_byte(
    pytester: pytest.Pytester, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three dense layers, then five of experts: the cuts have one and two of each."""
    pytester.makepyfile(TEST)
    config = {
        **PRESETS["tiny-llama"], "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 8, "first_k_dense_replace": 3, "q_lora_rank": 64, "kv_lora_rank": 64,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
        "num_key_value_heads": PRESETS["tiny-llama"]["num_attention_heads"],
    }  # fmt: skip
    (pytester.path / "deep.json").write_text(json.dumps(config))
    record = (*OPTIONS, "--llm-model=deep=random:deep.json", "--llm-record-missing")
    for layers in ("--llm-layers=1", "--llm-layers=2", "--llm-layers=0"):
        project(*record, layers, fast=False).assert_outcomes(passed=1)
    capsys.readouterr()
    assert main(["plan", "deep=random:deep.json", "--gpu", "8GiB", "--measured", "baselines", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["measured"]
    assert row["cuts"] == [1, 2]
    truth = recorded(pytester.path, "deep")["memory"]
    assert row["metrics"]["host.weights"] == {"value": truth["host.weights"], "exact": True}


def test_a_cut_is_gated_apart_from_the_whole(pytester: pytest.Pytester, project: Project, eight: str) -> None:
    cut = (*OPTIONS, eight, "--llm-layers=2")
    missing = project(*cut, fast=False)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*baselines/deep@2-layers/*/none.json*", "*--llm-layers=2*--llm-update-baselines*"])
    project(*cut, "--llm-update-baselines", "--llm-record-repeats=1", fast=False).assert_outcomes(passed=1)
    again = project(*cut, "--llm-strict", "--llm-report=run.json", fast=False)
    again.assert_outcomes(passed=1)
    [run] = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert run["spec"]["name"] == "deep@2-layers"
    # Twice the feed-forward in every layer: the cut shows it.
    wide = {**PRESETS["tiny-llama"], "num_hidden_layers": 8, "intermediate_size": 2048}
    (pytester.path / "deep.json").write_text(json.dumps(wide))
    changed = project(*cut, fast=False)
    changed.assert_outcomes(failed=1)
    changed.stdout.fnmatch_lines(["*deep@2-layers*"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--llm-layers=4x"], "*--llm-layers: '4x' is not a number of layers*"),
        (
            ["--llm-layers=2", "--llm-endpoint=http://127.0.0.1:1"],
            "*--llm-layers: a running server has loaded its whole*",
        ),
    ],
)
def test_what_is_no_cut_is_a_usage_error(project: Project, eight: str, arguments: list[str], said: str) -> None:
    refused = project(*OPTIONS, eight, *arguments, fast=False)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines([said])


def test_a_cut_that_leaves_nothing_out_is_an_error_of_the_setup(project: Project, eight: str) -> None:
    refused = project(*OPTIONS, eight, "--llm-layers=8", fast=False)
    refused.assert_outcomes(errors=2)
    refused.stdout.fnmatch_lines(["*'llama' has 8 layers, and a cut to 8 leaves none of them out: load fewer*"])
