"""``--llm-predict``: memory of a GPU, gated where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from git_repository import commit, start_repository

H100 = "nvidia-h100-80gb-hbm3"
BASELINES = Path(__file__).parents[2] / "baselines" / "llama-1b" / H100 / "none.json"
MODEL = "--llm-model=random:llama-1b"
LOADER = """
def load(spec):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(spec.model, device_map={"": 0}, dtype="auto")
    return model
"""
WASTEFUL = LOADER.replace("    return", "    model.kept = model.lm_head.weight.detach().clone()\n    return")


def test_a_committed_baseline_is_gated_and_nothing_is_written(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        def test_memory(llm, memory_baseline):
            memory_baseline.check(llm)

        def test_latency(llm, latency_baseline):
            assert latency_baseline.check(llm) is None

        def test_use(llm):
            llm.run("os:getpid")
        """
    )
    target = pytester.path / "baselines" / "llama-1b" / H100 / "none.json"
    target.parent.mkdir(parents=True)
    recorded = json.loads(BASELINES.read_text())
    shutil.copy(BASELINES, target)
    before = target.read_bytes()
    fine = project(MODEL, f"--llm-predict={H100}", "-rs", fast=False)
    fine.assert_outcomes(passed=2, skipped=1)
    fine.stdout.fnmatch_lines([f"llama-1b on {H100} (predicted)", "*there is no model to use*"])
    assert target.read_bytes() == before

    recorded["memory"]["gpu.settled"] -= 8 << 20
    target.write_text(json.dumps(recorded))
    before = target.read_bytes()
    red = project(MODEL, f"--llm-predict={H100}", "-k", "memory", fast=False)
    red.assert_outcomes(failed=1)
    red.stdout.fnmatch_lines(
        [
            f"*memory regressed: llama-1b / none on {H100} (predicted)",
            "  gpu.settled  2.295 GiB -> 2.303 GiB  (+8.00 MiB, tolerance 2 MiB)",
            "*allocates*at the peak of the load: aten._to_copy.default at transformers/core_model_loading.py:*",
        ]
    )
    # What accepts it measures on the device.
    assert "--llm-update-baselines" in red.stdout.str()
    assert "--llm-predict" not in red.stdout.str().partition("accept ")[2].splitlines()[0]
    assert target.read_bytes() == before


def test_a_regression_is_compared_with_the_code_of_another_revision(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        test_own="def test_memory(llm, memory_baseline):\n    memory_baseline.check(llm, metrics=['gpu.settled'])\n"
    )
    source = pytester.path / "ourapp.py"
    source.write_text(LOADER)
    start_repository()
    commit("base", "ourapp.py")
    source.write_text(WASTEFUL)
    arguments = ("--llm-model=random:tiny-llama", "--llm-loader=ourapp:load", f"--llm-predict={H100}")
    missing = project(*arguments, "--llm-report=now.json", fast=False)
    missing.assert_outcomes(failed=1)
    (run,) = json.loads((pytester.path / "now.json").read_text())["runs"]
    target = pytester.path / "baselines" / "tiny-llama" / H100 / f"{run['variant']}.json"
    target.parent.mkdir(parents=True)
    recorded = json.loads(BASELINES.read_text())
    recorded |= {"digests": run["digests"], "manifest": []}
    recorded["numbers"] = {"buffers": {}, "logits": [], "logsumexp": [], "margin": []}
    recorded["spec"] = {"strategy": "loader", "target": "ourapp:load"}
    recorded["memory"] = {"gpu.settled": run["metrics"]["gpu.settled"] - (4 << 20)}
    target.write_text(json.dumps(recorded))
    red = project(*arguments, "--llm-against=HEAD", fast=False)
    red.assert_outcomes(failed=1)
    red.stdout.fnmatch_lines(["*allocates*more than HEAD*aten.clone.default at *ourapp.py:5 load"])
    unknown = project(*arguments, "--llm-against=nowhere", fast=False)
    unknown.stdout.fnmatch_lines(["*--llm-against: git archive says*nowhere*"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--llm-predict=h100"], "*loads cannot be predicted for 'h100'*nvidia-h100-80gb-hbm3*"),
        ([f"--llm-predict={H100}", "--llm-update-baselines"], "*a prediction records nothing*update-baselines*"),
        ([f"--llm-predict={H100}", "--llm-isolation=inline"], "*needs processes*isolation=inline*"),
        (["--llm-against=HEAD"], "*needs the device to predict for*"),
    ],
)
def test_what_cannot_be_predicted_is_a_usage_error(
    project: Callable[..., pytest.RunResult], arguments: list[str], says: str
) -> None:
    result = project(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([says])
