"""Latency with real processes: budgets, the gate against planted slowdowns, and pytest-benchmark."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llmload.system.page_cache import set_page_cache

BASELINE = Path(f"baselines/tiny-llama/cpu-{platform.machine()}/none.json")
#: Three processes are always timed; more where the test is about the verdict of a time.
RECORD = ("--llm-update-baselines", "--llm-record-repeats=1")
SHORT = "--llm-latency-time=0s"

#: What slows a model down although no test requests it, by the module that does it in each load's process.
PLANTED = Path(__file__).parents[2] / "benchmarks" / "planted"
#: A load of this size is lost in the noise unless it is much longer.
READ_OVER_AND_OVER = """
    import transformers
    load = transformers.LlamaForCausalLM.from_pretrained.__func__
    def twice(cls, *args, **kwargs):
        for _ in range(4):
            load(cls, *args, **kwargs)
        return load(cls, *args, **kwargs)
    transformers.LlamaForCausalLM.from_pretrained = classmethod(twice)
"""


def test_a_slowdown_is_caught_and_explained(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """A key-value cache switched off, attention falling back to eager, weights read more than once."""
    pytester.makepyfile(
        no_cache=(PLANTED / "no_cache.py").read_text(),
        read_twice=READ_OVER_AND_OVER,
        falls_back=(PLANTED / "falls_back.py").read_text(),
        test_it="""
        def test_times(llm, latency_baseline):
            latency_baseline.check(llm)
        def test_work(llm, latency_baseline):
            latency_baseline.check(llm, metrics=["token.ops", "prefill.ops"])
        def test_load(llm, latency_baseline):
            latency_baseline.check(llm, metrics=["load"])
        """,
    )
    project("test_it.py::test_times", *RECORD, SHORT).assert_outcomes(passed=1)
    stored = json.loads(BASELINE.read_text())
    (host, times), *others = stored["time"].items()
    assert not others
    assert host.endswith("/1 threads")
    assert set(times) == {"load", "ttft", "per_token"}
    assert times["load"]["page_cache"] == "warm"
    assert len(times["per_token"]["samples"]) == len(times["per_token"]["control"]) >= 3
    assert max(map(len, times["per_token"]["samples"])) <= 11
    assert set(stored["work"]) == {"prefill.ops", "token.ops"}

    project(SHORT).assert_outcomes(passed=3)
    before = BASELINE.read_bytes()

    eager = project("test_it.py::test_work", "--llm-import=falls_back")
    eager.assert_outcomes(failed=1)
    eager.stdout.fnmatch_lines(["*work regressed: tiny-llama / none*", "*token.ops  *exact)*"])

    # By its work alone: as a time that has changed, it would take seven processes of a second or two.
    uncached = project("test_it.py::test_work", "--llm-import=no_cache")
    uncached.assert_outcomes(failed=1)
    text = uncached.stdout.str()
    assert "token.ops" in text
    assert "tiny-llama / none" in text

    # Load time is wall time: on a busy machine the seconds given may not settle it, but it is never called fine.
    twice = project(
        "test_it.py::test_load", "--llm-import=read_twice", "--llm-latency-time=12s", "--llm-report=run.json"
    )
    (run,) = json.loads(Path("run.json").read_text())["runs"]
    verdict = run["verdicts"]["time"]["metrics"]["load"]["verdict"]
    assert verdict in ("regressed", "inconclusive")
    if verdict == "regressed":
        twice.assert_outcomes(failed=1)
        twice.stdout.fnmatch_lines(
            ["*latency regressed: tiny-llama / none*", "*load  *tolerance 10 %*times the baseline's*"]
        )
    assert BASELINE.read_bytes() == before


def test_what_there_is_nothing_to_compare_with(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """Another kind of host, and budgets relative to a baseline: said, and a failure under strict only."""
    pytester.makepyfile(
        test_record="def test_times(llm, latency_baseline): latency_baseline.check(llm)",
        test_it="""
        import pytest
        @pytest.mark.latency_budget(per_token="+1000000000%", load="+1000000000%")
        def test_wide(llm): pass
        @pytest.mark.latency_budget(per_token="+1%")
        def test_tight(llm): pass
        """,
    )
    unknown = project("test_it.py", "-k", "tight", "--llm-strict")
    unknown.assert_outcomes(failed=1, deselected=1)
    assert "latency_budget(per_token=+1%): nothing is recorded for this load" in unknown.stdout.str()

    project("test_record.py", *RECORD, SHORT).assert_outcomes(passed=1)
    stored = json.loads(BASELINE.read_text())
    (times,) = stored["time"].values()
    assert [len(times[name]["samples"]) for name in ("load", "ttft", "per_token")] == [3, 3, 3]
    token = times["per_token"]
    token["median"] /= 1000
    for name in {"samples", "relative"} & token.keys():
        token[name] = [[sample / 1000 for sample in process] for process in token[name]]
    BASELINE.write_text(json.dumps(stored))
    budgets = project("test_it.py")
    budgets.assert_outcomes(passed=1, failed=1)
    budgets.stdout.fnmatch_lines(
        ["*latency budget exceeded: per_token is * (median of * processes), *+1 % over the recorded *"]
    )

    stored["time"] = {"nvidia-h100/another cpu/580": times}
    BASELINE.write_text(json.dumps(stored))
    elsewhere = project("test_record.py", "test_it.py", "-k", "times or tight")
    elsewhere.assert_outcomes(passed=2, deselected=1)
    elsewhere.stdout.fnmatch_lines(
        ["not compared:", "  tiny-llama*: load, *incomparable, recorded on nvidia-h100/another cpu/580;*"]
    )


def test_a_wrong_budget_is_a_usage_error(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.latency_budget(per_token="10%")
        def test_a(llm): pass
        """
    )
    result = project()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*'10%' is not a time: write a number and one of*"])


def test_the_page_cache_is_as_asked(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    (pytester.path / "any.safetensors").write_bytes(bytes(1 << 20))
    if set_page_cache(str(pytester.path), "cold") != "cold":
        pytest.skip("this file system does not drop pages")
    pytester.makepyfile("def test_a(llm): assert llm.environment['page_cache'] == 'cold'")
    # A checkpoint of its own: pages that another process has mapped cannot be dropped.
    own = f"--llmload-cache-dir={pytester.path / 'own'}"
    project("--llm-page-cache=cold", own, cached=False).assert_outcomes(passed=1)
    assert project("--llm-page-cache=hot").ret == pytest.ExitCode.USAGE_ERROR


# --- pytest-benchmark ------------------------------------------------------------------------------------------------

BENCHMARK = """
    import time
    import pytest
    def busy(model, tokenizer, seconds):
        begin = time.perf_counter()
        while time.perf_counter() < begin + seconds:
            pass
        with open("took.txt", "a") as took:
            print(time.perf_counter() - begin, file=took)
        return type(model).__name__
    @pytest.mark.benchmark(group="calls")
    def test_busy(llm, llm_benchmark):
        assert llm_benchmark(busy, 0.05, rounds=3) == "LlamaForCausalLM"
"""


def test_benchmarks_are_timed_where_the_model_lives(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(BENCHMARK)
    first = project("--benchmark-json=first.json", "--benchmark-save=first", others=True)
    first.assert_outcomes(passed=1)
    first.stdout.fnmatch_lines(["*benchmark 'calls': 1 tests*"])
    (entry,) = json.loads(Path("first.json").read_text())["benchmarks"]
    assert entry["group"] == "calls"
    assert entry["params"] == {"llm_spec": "tiny-llama-none"}
    assert entry["stats"]["rounds"] == 3
    # The way to the load's process and back is in no figure: each is what the function itself took.
    _, *took = [float(line) for line in Path("took.txt").read_text().split()]
    beyond = [figure - own for figure, own in zip(entry["stats"]["data"], took, strict=True)]
    assert 0 < min(beyond) < 0.005
    assert min(entry["stats"]["data"]) >= 0.05
    compared = project("--benchmark-compare=0001", "--benchmark-compare-fail=min:50%", "--benchmark-only", others=True)
    compared.assert_outcomes(passed=1)
    text = compared.stdout.str()
    assert "(NOW)" in text
    assert "(0001_first)" in text


def test_without_pytest_benchmark_its_fixture_skips(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile("def test_a(llm_benchmark): llm_benchmark(print)")
    result = project("-p", "no:benchmark", "-rs", others=True)
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*llm_benchmark needs pytest-benchmark: pip install 'pytest-llmload?benchmark?'*"])


def test_recording_counts_alone_times_nothing(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        ours="""
        import transformers
        def load(spec):
            with open("calls.txt", "a") as file:
                file.write("x")
            return transformers.AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")
        """,
        test_it="""
        import pytest
        @pytest.mark.strategy("loader", target="ours:load")
        def test_work(llm, latency_baseline): latency_baseline.check(llm, metrics=["token.ops"])
        """,
    )
    project(*RECORD).assert_outcomes(passed=1)
    (file,) = (pytester.path / "baselines").rglob("*.json")
    baseline = json.loads(file.read_text())
    assert (list(baseline["work"]), baseline["time"]) == (["token.ops"], {})
    # One load that is shared by tests, and one whose work is counted.
    assert (pytester.path / "calls.txt").read_text() == "xx"
