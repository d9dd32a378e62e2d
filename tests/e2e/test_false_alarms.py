"""Clean runs stay green: fresh processes of unchanged models, one of them a mixture of experts of over 200 MiB.

What is just above their noise is red.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

#: Needs ten MiB for a moment, above the highest moment of a clean load, which is ``BELOW`` bytes above the phase's own.
TRANSIENT = """
import torch
import transformers
from pytest_llmload.system.proc import status

original = transformers.PLACE

def planted(*args, **kwargs):
    given = original(*args, **kwargs)
    transformers.PLACE = original
    now = status()
    torch.ones(now["VmHWM"] - now["VmRSS"] + BELOW + (10 << 20), dtype=torch.uint8)
    return given

transformers.PLACE = planted
"""
PLACES = {
    "load": "quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer._process_model_after_weight_loading",
    "forward": "LlamaForCausalLM.forward",
}


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
    recorded = project("--llm-update-baselines", "--llm-record-repeats=1", "-k", "0 or 1")
    recorded.assert_outcomes(passed=8, deselected=12)
    clean = project()
    clean.assert_outcomes(passed=20)
    assert "improved" not in clean.stdout.str()


def test_ten_mebibytes_more_in_a_small_load_are_red(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """For a moment only, while it loads or while it runs, in a load that needs some 25 MiB."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.quant("nf4")
        def test_small(llm, memory_baseline): memory_baseline.check(llm)
        """
    )
    project("--llm-update-baselines", "--llm-report=clean.json").assert_outcomes(passed=1)
    (clean,) = json.loads((pytester.path / "clean.json").read_text())["runs"]
    project().assert_outcomes(passed=1)
    for phase, place in PLACES.items():
        below = clean["metrics"]["host.peak"] - clean["phase_peaks"][phase]["host"]
        text = TRANSIENT.replace("PLACE", place).replace("BELOW", str(below))
        (pytester.path / f"planted_{phase}.py").write_text(text)
        red = project(f"--llm-import=planted_{phase}", "--llm-report=red.json")
        red.assert_outcomes(failed=1)
        (run,) = json.loads((pytester.path / "red.json").read_text())["runs"]
        red.stdout.fnmatch_lines(["memory regressed: *", "* host.peak *MiB -> *"])
        assert run["metrics"]["host.peak"] > clean["metrics"]["host.peak"] + (8 << 20)
