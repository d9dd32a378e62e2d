"""Together with others: xdist, randomly, selection, ordering, strict modes, and not at all."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

TWO_FILES = {
    "test_one": """
        import pytest
        @pytest.mark.dtype("bf16", "fp32")
        def test_a(llm): assert llm.generate("x", max_new_tokens=2).tokens
        def test_plain(): pass
        @pytest.mark.dtype("fp16")
        def test_b(llm): pass
    """,
    "test_two": """
        import pytest
        @pytest.mark.dtype("fp32", "fp16")
        def test_c(llm): assert llm.generate("x", max_new_tokens=2).tokens
        @pytest.mark.strategy("bf16")
        def test_d(llm): assert llm.generate("x", max_new_tokens=2).tokens
    """,
    # Counts real loads: the hook is called once for each.
    "conftest": """
        import os
        def pytest_llmload_load_finished(config, result):
            with open("loads.txt", "a") as log:
                log.write(f"{result.spec['dtype']} {os.getpid()}\\n")
    """,
}


def loads(pytester: pytest.Pytester) -> list[str]:
    """Dtypes of the loads that were really made, in order; forgotten afterwards."""
    log = pytester.path / "loads.txt"
    lines = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_one_load_per_spec_under_any_order(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(**TWO_FILES)
    project().assert_outcomes(passed=7)
    assert sorted(loads(pytester)) == ["bf16", "fp16", "fp32"]
    project("-n", "2").assert_outcomes(passed=7)
    assert sorted(loads(pytester)) == ["bf16", "fp16", "fp32"]


def test_a_worker_that_crashes_costs_one_test_and_the_run_ends(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """A worker waits for its next test before it runs one, so a scheduler that forgets to say more hangs for ever."""
    pytester.makepyfile(
        test_it="""
        import os
        import pytest
        @pytest.mark.parametrize("i", range(3))
        def test_before(i): pass
        def test_dies(): os.kill(os.getpid(), 9)
        @pytest.mark.parametrize("i", range(3))
        def test_after(i): pass
        """
    )
    project("-n", "2", fast=False, cached=False).assert_outcomes(passed=6, failed=1)
    pytester.makepyfile(
        conftest=TWO_FILES["conftest"],
        test_loads="""
        import os
        import pytest
        @pytest.mark.dtype("bf16", "fp32")
        class TestOne:
            def test_a(self, llm): pass
            def test_b(self, llm): assert llm.generate("x", max_new_tokens=2).tokens
        @pytest.mark.dtype("fp16")
        class TestTwo:
            def test_a(self, llm): pass
            def test_dies(self, llm): os.kill(os.getpid(), 9)
            def test_b(self, llm): assert llm.generate("x", max_new_tokens=2).tokens
        """,
    )
    project("-n", "2").assert_outcomes(passed=12, failed=2)
    # What was left of the load whose worker died is loaded once more, the rest once.
    assert sorted(loads(pytester)) == ["bf16", "fp16", "fp16", "fp32"]


@pytest.mark.parametrize("arguments", [("-p", "randomly"), ("--ff",), ("--nf",), ("-n", "2", "--dist", "load")])
def test_orderings_keep_the_loads_together(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], arguments: tuple[str, ...]
) -> None:
    files = {**TWO_FILES, "test_two": TWO_FILES["test_two"].rstrip() + "\n        def test_fails(llm): assert False\n"}
    pytester.makepyfile(**files)
    if {"--ff", "--nf"} & {*arguments}:
        # What these order by.
        project("-k", "test_fails or test_d").assert_outcomes(passed=1, failed=1, deselected=6)
        loads(pytester)
    if arguments == ("-p", "randomly"):
        result = project(randomly=True)
        assert "random seed" in result.stdout.str() or "randomly-seed" in result.stdout.str()
    else:
        result = project(*arguments)
    result.assert_outcomes(passed=7, failed=1)
    assert sorted(loads(pytester)) == ["None", "bf16", "fp16", "fp32"]


def test_selection_loads_only_what_is_needed(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(**TWO_FILES)
    project("-k", "fp32").assert_outcomes(passed=2, deselected=5)
    assert loads(pytester) == ["fp32"]
    project("test_one.py::test_b").assert_outcomes(passed=1)
    assert loads(pytester) == ["fp16"]
    project("-m", "not llmload").assert_outcomes(passed=1, deselected=6)
    assert loads(pytester) == []
    pytester.makepyfile(test_two="def test_fails(llm): assert False\ndef test_after(llm): pass")
    project("-x", "test_two.py").assert_outcomes(failed=1)
    loads(pytester)
    project("--lf", "test_two.py").assert_outcomes(failed=1)
    assert loads(pytester) == ["None"]


def test_collecting_only_loads_nothing_and_imports_nothing_heavy(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(**TWO_FILES)
    pytester.makeconftest(
        """
        import sys
        import time
        def pytest_unconfigure(config):
            heavy = {"torch", "transformers", "numpy", "cloudpickle", "pynvml"} & set(sys.modules)
            print("heavy:", sorted(heavy))
            assert time.process_time() < 10
        """
    )
    result = project("--collect-only", "-q", "-p", "no:benchmark", cold=True)
    assert result.ret == pytest.ExitCode.OK
    assert "heavy: []" in result.stdout.str()


def test_a_strange_run_is_left_alone(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    """No option, no fixture, no marker of ours: nothing of ours is imported beyond the entry module's needs."""
    pytester.makepyfile("def test_a(): pass")
    pytester.makeconftest(
        """
        import sys
        def pytest_unconfigure(config):
            ours = sorted(name for name in sys.modules if name.startswith("pytest_llmload"))
            heavy = {"torch", "transformers", "numpy"} & set(sys.modules)
            print("ours:", ours, "heavy:", sorted(heavy))
        """
    )
    text = project(fast=False, cached=False, cold=True).stdout.str()
    ours = set(re.findall(r"'(pytest_llmload[\w.]*)'", text))
    assert ours == {
        "pytest_llmload",
        "pytest_llmload.plugin",
        "pytest_llmload.host",
        "pytest_llmload.host.hooks",
        "pytest_llmload.host.markers",
        "pytest_llmload.host.run",
        "pytest_llmload.host.settings",
        "pytest_llmload.host.hooks.grouping",
        "pytest_llmload.host.hooks.header",
        "pytest_llmload.host.hooks.hookspecs",
        "pytest_llmload.host.settings.options",
        "pytest_llmload.host.markers.base",
        "pytest_llmload.host.markers.limits",
        "pytest_llmload.host.markers.load",
        "pytest_llmload.host.markers.table",
        "pytest_llmload.host.run.stash",
        "pytest_llmload.integrations",
        "pytest_llmload.integrations.benchmark",
        "pytest_llmload.integrations.reporters",
        "pytest_llmload.integrations.xdist",
    }
    assert "heavy: []" in text


def test_switched_off_and_strict(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile("def test_a(): pass")
    project("-p", "no:llmload", fast=False, cached=False).assert_outcomes(passed=1)
    pytester.makepyfile(**TWO_FILES)
    # pytest 8 has no such option, and would refuse it.
    strict = "strict = true\n" if pytest.version_tuple >= (9,) else ""
    pytester.makeini(f"[pytest]\n{strict}addopts = --strict-markers --strict-config\n")
    project("--collect-only").assert_outcomes()
    result = project("-k", "test_b", "-W", "error")
    result.assert_outcomes(passed=1, deselected=7)


def test_the_same_verdicts_under_xdist_and_one_report(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    import json

    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.quant("none", "nf4")
        def test_memory(llm, memory_baseline): memory_baseline.check(llm)
        @pytest.mark.dtype("fp32")
        def test_bad(llm, memory_baseline): memory_baseline.check(llm)
        @pytest.mark.gpu_count(2)
        def test_gpus(llm): pass
        """
    )
    project("-n", "2", "--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=3, skipped=1)
    path = next(pytester.path.glob("baselines/tiny-llama/*/fp32.json"))
    path.write_text(path.read_text().replace('"host.weights": ', '"host.weights": 1'))
    verdicts = []
    for arguments in ((), ("-n", "2")):
        result = project(*arguments, "--llm-report=run.json")
        result.assert_outcomes(passed=3, skipped=1)
        report = json.loads((pytester.path / "run.json").read_text())
        verdicts.append({run["id"]: (run["outcome"], run["verdict"]) for run in report["runs"]})
        assert "tiny-llama on cpu" in result.stdout.str()
    assert verdicts[0] == verdicts[1]
    assert verdicts[0]["tiny-llama-nf4"] == ("pass", "ok")
    assert verdicts[0]["tiny-llama-fp32"][1] == "improved"
    usage = project("-n", "2", "--llm-workload=many")
    assert "is not a workload" in usage.stderr.str() + usage.stdout.str()


def test_a_load_in_two_workers_is_one_run_with_all_that_was_said(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    import json

    pytester.makepyfile(
        test_one="def test_good(llm): pass",
        test_two="""
        def test_bad(llm, memory_baseline):
            memory_baseline.check(llm)
            assert False, "for a reason"
        """,
        test_three="from pytest_llmload.suite import *",
    )
    record = ("--llm-record-missing", "--llm-record-repeats=1", "--llm-report=run.json")
    result = project("-n", "2", "--dist", "loadfile", "-k", "good or bad", *record)
    result.assert_outcomes(passed=1, failed=1)
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert (run["outcome"], run["verdict"], len(run["tests"])) == ("fail", "recorded", 2)
    assert run["baseline"].endswith("none.json")
    result.stdout.fnmatch_lines(["*not loaded by the suite: *"])


def test_the_suite_is_collected_whatever_the_ini_says_and_by_star_import(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\npython_files = check_*.py\n")
    result = project("--pyargs", "pytest_llmload.suite", "--llm-strategy=bf16", "--collect-only", "-q")
    assert "test_memory[tiny-llama-bf16]" in result.stdout.str()
    pytester.makepyfile(check_mine="from pytest_llmload.suite import *")
    result = project("check_mine.py", "--llm-strategy=nf4", "--llm-record-missing", "--llm-record-repeats=1")
    result.assert_outcomes(passed=4)
    assert len(list(pytester.path.glob("baselines/tiny-llama/*/nf4*.json"))) == 2


def test_user_hooks_register_strategies_and_rename_devices(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        ours="""
        from pytest_llmload.strategies import Strategy
        class Eager(Strategy):
            name = "eager_only"
            summary = "Eager attention."
            fields = {"strategy": "eager_only"}
            def load_kwargs(self, job): return {"device_map": {"": "cpu"}, "attn_implementation": "eager"}
            def load(self, job, kwargs): return super().load(job, kwargs)
        """,
        conftest="""
        def pytest_llmload_strategies(config): return {"eager_only": "ours:Eager"}
        def pytest_llmload_device_key(config, device): return "our-runner"
        """,
        test_it="""
        import pytest
        @pytest.mark.strategy("eager_only")
        def test_a(llm, memory_baseline):
            memory_baseline.check(llm)
            assert llm.run(lambda m, t: m.config._attn_implementation) == "eager"
        """,
    )
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    assert (pytester.path / "baselines/tiny-llama/our-runner/eager_only.json").exists()
