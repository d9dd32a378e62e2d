"""What a user sees where a check of ours raises: the test's own outcome, and an ERROR that names the check."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

TESTS = """
    def test_first(llm, memory_baseline):
        memory_baseline.check(llm)
    def test_second(llm):
        assert llm.metrics["host.weights"] > 0
"""
BROKEN = """
    from pytest_llmload.worker import checks
    def broken(loaded):
        yield from ()
        raise ZeroDivisionError("integer modulo by zero")
    checks.AFTER_LOAD = (*checks.AFTER_LOAD, broken)
"""


def test_a_check_that_raises_is_an_error_and_no_failure(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(TESTS, broken_check=BROKEN)
    result = project("--llm-import=broken_check", "--llm-record-missing", "--llm-report=run.json")
    result.assert_outcomes(passed=2, errors=1)
    text = result.stdout.str()
    assert "check 'broken_check.broken' of pytest-llmload raised ZeroDivisionError: integer modulo by zero" in text
    assert "the load failed" not in text
    run = json.loads((pytester.path / "run.json").read_text())["runs"][0]
    assert (run["outcome"], run["load"]) == ("error", "loaded")
    assert run["faults"][0]["who"] == "check 'broken_check.broken' of pytest-llmload"
