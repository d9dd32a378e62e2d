"""``--llm-layers``: a gate on a model's first layers, apart from the whole model's, and what it tells of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.cli import main
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


OPTIONS = ("--llm-device=cpu", "--llm-workload=1x16+4", "--llm-record-repeats=1")


def recorded(root: Path, name: str) -> dict[str, Any]:
    [file] = (root / "baselines" / name).glob("cpu-*/none.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


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
    plan = ["plan", "deep=random:deep.json", "--gpu", "8GiB", "--measured", "baselines"]
    capsys.readouterr()
    assert main([*plan, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["measured"]
    assert row["cuts"] == [2, 4]
    truth = recorded(pytester.path, "deep")["memory"]
    for name in ("host.weights", "weights.logical"):
        assert row["metrics"][name] == {"value": truth[name], "exact": True}
    assert not row["metrics"]["host.peak"]["exact"]
    assert main(plan) == 0
    assert "none on cpu-x86_64, all 8 layers as cuts to 2, 4 tell:" in capsys.readouterr().out


def test_a_cut_is_gated_apart_from_the_whole(pytester: pytest.Pytester, project: Project, eight: str) -> None:
    cut = (*OPTIONS, eight, "--llm-layers=2")
    missing = project(*cut, fast=False)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*baselines/deep@2-layers/*/none.json*", "*--llm-layers=2*--llm-update-baselines*"])
    project(*cut, "--llm-update-baselines", fast=False).assert_outcomes(passed=1)
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
