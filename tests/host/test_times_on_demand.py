"""Times are measured if a test looks at them, and not otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest


def test_times_are_taken_only_for_tests_that_look_at_them(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest

        def test_memory(llm):
            assert "ttft" not in llm.metrics
            with pytest.raises(KeyError, match="no test of this load looks at times"):
                llm.metrics["ttft"]

        @pytest.mark.dtype("fp32")
        @pytest.mark.latency_budget(per_token="10min")
        def test_budget(llm):
            assert llm.metrics["ttft"] > 0
            assert len(llm.timing.samples["ttft"]) == 3

        @pytest.mark.dtype("fp16")
        def test_asks(llm):
            loaded = llm.timing.load
            assert llm.timing.per_token > 0
            assert llm.metrics["per_token"] == llm.timing.per_token
            assert llm.timing.load == loaded, "the times of a further process are not the load's"
            assert llm.generate([5], max_new_tokens=2).tokens
        """
    )
    project("--llm-report=run.json").assert_outcomes(passed=3)
    runs = {run["variant"]: run for run in json.loads((pytester.path / "run.json").read_text())["runs"]}
    timed = {variant: "per_token" in run["metrics"] for variant, run in runs.items()}
    assert timed == {"none": False, "fp32": True, "fp16": True}
    assert runs["none"]["phases"]["timing"] < runs["fp32"]["phases"]["timing"]


def test_a_load_is_expected_as_often_as_it_is_recorded(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """What is expected next is prepared beside a load on a GPU."""
    pytester.makeconftest(
        """
        from pytest_llmload.host.run.stash import state_of

        def pytest_report_collectionfinish(config):
            return "expected: " + " ".join(spec.dtype for spec in state_of(config).broker.expected.specs)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.dtype("fp32")
        def test_recorded(llm, memory_baseline): ...

        @pytest.mark.dtype("fp16")
        def test_not_recorded(llm): ...
        """
    )
    for options, expected in (
        ((), "fp32 fp16"),
        (("--llm-record-missing", "--llm-record-repeats=3"), "fp32 fp32 fp32 fp16"),
        (("--llm-update-baselines",), "fp32 fp32 fp16"),
    ):
        project("--collect-only", *options).stdout.fnmatch_lines([f"expected: {expected}"])
