"""A team's way: a baseline in git, a branch that regresses, red in CI, accepted from the job's report, green."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from git_repository import commit, git, start_repository
from serving_project import SERVING, TESTS

Project = Callable[..., pytest.RunResult]
COMMITTED = ("baselines", "serving.py", "test_serving.py")


def llmload(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """The command where no torch can be imported: the machine on which a change is accepted has none."""
    program = "import sys; sys.modules['torch'] = None; from pytest_llmload.cli import main; sys.exit(main())"
    return pytester.run(sys.executable, "-c", program, *arguments)


def test_red_accepted_green_and_seen_in_history(
    pytester: pytest.Pytester, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    pytester.makepyfile(serving=SERVING.format(dtype="bfloat16"), test_serving=TESTS)
    start_repository()
    project("--llm-update-baselines", "--llm-record-repeats=1", preset=True).assert_outcomes(passed=1)
    commit("Record the production loader", *COMMITTED)

    git("checkout", "-q", "-b", "fp32")
    pytester.makepyfile(serving=SERVING.format(dtype="float32"))
    summary.unlink()
    red = project("--llm-strict", "--llm-report=run.json", "--llm-report=run.html", preset=True)
    red.assert_outcomes(failed=1)
    assert red.ret == 1
    text = summary.read_text()
    assert "1 of 1 load failed (1 regressed)" in text
    assert "bfloat16 -> float32" in text
    assert "host.weights" in text
    assert "--llm-update-baselines" in text

    accepted = llmload(pytester, "accept", "run.json")
    assert accepted.ret == 0
    accepted.stdout.fnmatch_lines(["  accepted  host.weights *MiB -> *MiB  (+*"])
    commit("Accept fp32", *COMMITTED)
    project("--llm-strict", preset=True).assert_outcomes(passed=1)

    history = llmload(pytester, "history", "host.weights")
    history.stdout.fnmatch_lines(["*▁█", "*Record the production loader", "*+*%*Accept fp32"])
    assert llmload(pytester, "diff", "main", "HEAD").ret == 1

    monkeypatch.delenv("GITHUB_ACTIONS")
    renamed = project("--llm-model=other=random:tiny-llama", fast=False)
    renamed.stdout.fnmatch_lines(
        [
            "llmload: 1 of 1 baseline is missing, its tests will fail: baselines/other/*",
            "*renamed?*recorded as tiny-llama: llmload rename tiny-llama other",
        ]
    )
    assert json.loads(Path("run.json").read_text())["schema"] == 1
