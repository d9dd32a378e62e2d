"""``--llm-budget``: what did not fit is listed as not measured, never as passed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Project = Callable[..., pytest.RunResult]


def test_a_load_that_has_not_started_in_time_is_not_measured(pytester: pytest.Pytester, project: Project) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.dtype("bf16", "fp32")
        class TestLoads:
            def test_one(self, llm): pass
            def test_two(self, llm): pass
        """
    )
    spent = project("--llm-budget=0.001s", "-rs")
    spent.assert_outcomes(passed=2, skipped=2)
    spent.stdout.fnmatch_lines(["  fp32 *skipped", "*not measured: --llm-budget of 1.0 ms is spent"])
    project("--llm-budget=0.001s", "--llm-strict", "-k", "fp32 or bf16").assert_outcomes(passed=2, errors=2)
