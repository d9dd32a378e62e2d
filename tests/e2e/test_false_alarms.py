"""Clean runs stay green: fresh processes of unchanged models, one of them a mixture of experts of over 200 MiB."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def test_twenty_clean_runs_in_a_row(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(
        """
        import pytest

        LOADS = [dict(), dict(dtype="fp32"), dict(quant="int8"), dict(quant="nf4", double_quant=True)]

        @pytest.mark.parametrize("n", range(5))
        @pytest.mark.parametrize("keywords", LOADS, ids=["none", "fp32", "int8", "nf4-dq"])
        def test_clean(llm_load, memory_baseline, keywords, n):
            model = "random:moe-128m" if keywords in ({}, {"dtype": "fp32"}) and n % 2 else "random:tiny-llama"
            llm = llm_load(model, **keywords)
            memory_baseline.check(llm)
            if model == "random:moe-128m":
                assert llm.memory.weights.logical > 200 << 20
        """
    )
    recorded = project("--llm-update-baselines", "-k", "0 or 1")
    recorded.assert_outcomes(passed=8, deselected=12)
    clean = project()
    clean.assert_outcomes(passed=20)
    assert "improved" not in clean.stdout.str()
