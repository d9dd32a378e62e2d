"""What users do every day: listing fixtures, running a test again, misspelling a name, passing the wrong thing."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]


@pytest.mark.parametrize("option", ["--fixtures", "--fixtures-per-test"])
def test_listing_fixtures_is_not_a_run(pytester: pytest.Pytester, project: Run, option: str) -> None:
    pytester.makepyfile("def test_a(llm): pass")
    result = project(option)
    assert result.ret == pytest.ExitCode.OK
    assert "nothing-measured" not in result.stdout.str() + result.stderr.str()


def test_a_rerun_loads_anew(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        ours="""
        import os
        from pathlib import Path
        from transformers import AutoModelForCausalLM

        def is_first(name):
            if Path(name).exists():
                return False
            Path(name).touch()
            return True

        def load(spec):
            if is_first("raised"):
                raise OSError("the network share is not mounted yet")
            return AutoModelForCausalLM.from_pretrained(spec.model)

        def killed(spec):
            if is_first("killed"):
                os.kill(os.getpid(), 9)
            return load(spec)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.strategy("loader", target="ours:load")
        class TestRaised:
            def test_a(self, llm): pass
            def test_b(self, llm): assert llm.outcome == "loaded"

        @pytest.mark.strategy("loader", target="ours:killed")
        def test_killed(llm): assert llm.outcome == "loaded"
        """
    )
    result = project("--reruns=1", "--llm-report=run.json", others=True)
    result.assert_outcomes(passed=3)
    assert "2 rerun" in result.stdout.str()
    runs = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert [(run["verdict"], run["outcome"], run["messages"]) for run in runs] == [("measured", "pass", [])] * 2
    assert [len(run["tests"]) for run in runs] == [2, 1]


def test_a_testcase_is_told_at_collection(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        import unittest
        import pytest

        class TestModel(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def model(self, llm):
                self.llm = llm

            def test_a(self): pass
        """
    )
    refused = project("--collect-only")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*TestModel::test_a: a method of unittest.TestCase cannot use llm*"])


def test_a_wrong_call_is_one_sentence_at_the_tests_line(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        def test_keyword(llm_load): llm_load(quants="nf4")
        def test_scheme(llm_load): llm_load(quant="nf5")
        def test_place(llm_load): llm_load(model="/nope")
        def test_map(llm_load): llm_load(device_map="balnced")
        def test_attn(llm_load): llm_load(attn="spda")
        def test_check(memory_baseline): memory_baseline.check(None)
        def test_batch(llm): llm.generate(["a", 5])
        def test_chat(llm): llm.generate([{"role": "user"}])
        def test_count(llm): llm.generate("a", max_new_tokens=0)
        def test_model(llm): llm.model
        def test_place_of_function(llm): llm.run("ours")
        def test_no_function(llm): llm.run(3)
        def test_figure(llm): llm.memory.host.peek
        def test_metric(llm): llm.metrics["host.peek"]
        """
    )
    result = project("--tb=short")
    result.assert_outcomes(failed=14)
    text = result.stdout.str()
    for sentence in (
        "unknown keyword 'quants'; did you mean 'quant'?; known: model, shared, env, options, strategy,",
        "test_scheme: llm_load: quant: unknown 'nf5'; use one of none, int8, nf4, fp4",
        "test_place: llm_load: '/nope' is",
        "device_map: 'balnced' is neither a device nor one of auto, balanced, sequential; did you mean 'balanced'?",
        "attn: unknown 'spda'; did you mean 'sdpa'?",
        "memory_baseline.check takes a load (the fixture llm, or what llm_load returns); got None",
        "(each a dict with 'role' and 'content'), or a list of such prompts; got ['a', 5]",
        "(each a dict with 'role' and 'content'), or a list of such prompts; got [{'role': 'user'}]",
        "max_new_tokens must be a whole number of at least 1; got 0",
        "the model lives in a process of its own: use llm.run(function)",
        "llm.run takes a function, or a text 'module:function'; got 'ours'",
        "llm.run takes a function, or a text 'module:function'; got 3",
        "AttributeError: host.peek was not measured: this load has no such figure; did you mean host.peak?",
        "KeyError: 'host.peek was not measured: this load has no such figure; did you mean host.peak?'",
    ):
        assert sentence in text
    # Every traceback ends at the test's own line.
    assert "/pytest_llmload/" not in text


def test_the_short_summary_begins_with_the_cause(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makepyfile(
        """
        import pytest

        def load(spec): raise OSError("the network share is not mounted")

        @pytest.mark.strategy("loader", target="test_the_short_summary_begins_with_the_cause:load")
        def test_a(llm): pass

        def refused(spec): raise OSError("the share is refused:\\n    no such host")

        @pytest.mark.strategy("loader", target="test_the_short_summary_begins_with_the_cause:refused")
        def test_b(llm): pass
        """
    )
    result = project("--junitxml=junit.xml")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "FAILED *::test_a* - because *OSError: the network share is not mounted*",
            "FAILED *::test_b* - because *OSError: the share is refused: no such host*",
        ]
    )
    assert 'message="because' in (pytester.path / "junit.xml").read_text()


def test_marks_that_sort_tests_on_purpose_win(pytester: pytest.Pytester, project: Run) -> None:
    text = """
        import pytest

        {one}
        @pytest.mark.dtype("fp32")
        def test_1(llm): pass

        {two}
        @pytest.mark.dtype("bf16")
        def test_2(llm): pass

        {three}
        @pytest.mark.dtype("fp32")
        def test_3(llm): pass
    """
    pytester.makepyfile(
        text.format(one="@pytest.mark.order(3)", two="@pytest.mark.order(2)", three="@pytest.mark.order(1)")
    )
    result = project("--collect-only", "-q", others=True)
    assert [line.partition("::")[2][:6] for line in result.outlines if "::" in line] == ["test_3", "test_2", "test_1"]
    project("--collect-only", others=True).stdout.fnmatch_lines(
        ["llmload: marks 'order' sort these tests, so tests of one load are not*"]
    )
    pytester.makepyfile(text.format(one="", two="", three=""))
    result = project("--collect-only", "-q")
    assert [line.partition("::")[2][:6] for line in result.outlines if "::" in line] == ["test_1", "test_3", "test_2"]
