"""What a run says as a whole, about tests whose loads never come to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

ON_TWO_GPUS = "def test_a(llm_load): llm_load(gpu_count=2)"


def report(pytester: pytest.Pytester) -> Any:
    return json.loads((pytester.path / "run.json").read_text())


def test_a_load_of_a_body_that_cannot_run_here_is_treated_like_one_of_a_marker(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(ON_TWO_GPUS)
    skipped = project("--llm-report=run.json", "-rsE")
    skipped.assert_outcomes(skipped=1, errors=1)
    skipped.stdout.fnmatch_lines(["SKIPPED*test_a_load*py:1: needs 2 GPUs*", "ERROR llmload::nothing-measured*"])
    (run,) = report(pytester)["runs"]
    assert (run["outcome"], run["verdict"], len(run["tests"])) == ("skip", "skipped", 1)
    assert run["messages"][0].startswith("needs 2 GPUs")


@pytest.mark.parametrize("flag", ["require-hardware", "strict"])
def test_where_skipping_is_ruled_out_it_is_an_error(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], flag: str
) -> None:
    pytester.makepyfile(ON_TWO_GPUS)
    result = project(f"--llm-{flag}", "--llm-report=run.json")
    result.assert_outcomes(errors=2)
    assert f"and --llm-{flag} makes that an error" in result.stdout.str()
    (run,) = report(pytester)["runs"]
    assert (run["outcome"], run["verdict"]) == ("error", "machine")


def test_a_spec_that_no_test_loads_is_no_load(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        def test_passes(llm_spec): assert llm_spec.name == "tiny-llama"
        @pytest.mark.quant("nf4")
        def test_fails(llm_spec): assert 0
        """
    )
    result = project("--llm-report=run.json", "--junitxml=junit.xml")
    result.assert_outcomes(passed=1, failed=1)
    assert report(pytester)["runs"] == []
    assert "tiny-llama on" not in result.stdout.str()


def test_a_load_that_is_asked_for_too_late_is_one_sentence(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile("def test_a(request): request.getfixturevalue('llm')")
    result = project()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["llm and llm_spec must be arguments of the test, or of a fixture that it names*"])
    assert "AttributeError" not in result.stdout.str()


@pytest.mark.parametrize("option", ["--setup-plan", "--setup-only"])
def test_a_run_that_runs_no_test_is_not_asked_what_it_measured(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], option: str
) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.skip\ndef test_a(llm): pass")
    result = project(option)
    assert "nothing-measured" not in result.stdout.str()
    assert result.ret == pytest.ExitCode.OK


def test_without_a_model_the_report_is_empty(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile("def test_a(): pass")
    project("--llm-report=run.json", fast=False).assert_outcomes(passed=1)
    assert report(pytester)["runs"] == []
