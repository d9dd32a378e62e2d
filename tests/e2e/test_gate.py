"""Record, gate, catch, update: the main job, with a real model in real processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

MEMORY = """
    def test_memory(llm, memory_baseline):
        memory_baseline.check(llm)
"""
#: A load that takes twice the time, where the scheme is part of what is tested.
QUANTISED = f"""
    import pytest
    @pytest.mark.quant("nf4"){MEMORY}"""
BASELINE = Path("baselines/tiny-llama/cpu-x86_64/none.json")

#: A quantiser that drops double quantisation when a test requests it.
NO_DOUBLE_QUANT = """
    import transformers
    init = transformers.BitsAndBytesConfig.__init__
    def without(self, *args, **kwargs):
        kwargs["bnb_4bit_use_double_quant"] = False
        init(self, *args, **kwargs)
    transformers.BitsAndBytesConfig.__init__ = without
"""


@pytest.fixture
def baseline(pytester: pytest.Pytester) -> Path:
    import platform

    return pytester.path / str(BASELINE).replace("x86_64", platform.machine())


def first_lines(result: pytest.RunResult, count: int = 3) -> str:
    """Return the lines right under the title of the first failure."""
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if line.startswith("____"))
    return "\n".join(lines[start + 1 : start + 1 + count])


def test_record_gate_tamper_update(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], baseline: Path
) -> None:
    """The whole life of a baseline."""
    project = partial(project, preset=True)
    pytester.makepyfile(MEMORY)

    missing = project()
    missing.assert_outcomes(failed=1)
    assert "memory baseline missing: tiny-llama / none" in first_lines(missing)
    command = next(line for line in missing.outlines if line.strip().startswith("record "))
    assert "--llm-update-baselines" in command
    assert "--llm-model=random:tiny-llama" in command
    assert not baseline.exists(), "nothing is written unless asked"

    recorded = project("--llm-update-baselines")
    recorded.assert_outcomes(passed=1)
    assert baseline.exists()
    stored = json.loads(baseline.read_text())
    assert str(pytester.path) not in baseline.read_text()

    before = baseline.read_bytes(), baseline.stat().st_mtime_ns
    project().assert_outcomes(passed=1)
    project("--llm-update-baselines").assert_outcomes(passed=1)
    assert (baseline.read_bytes(), baseline.stat().st_mtime_ns) == before, "an unchanged entry keeps its bytes"

    stored["memory"]["host.weights"] -= 1
    baseline.write_text(json.dumps(stored))
    regressed = project("--junitxml=junit.xml", "--llm-report=run.json")
    regressed.assert_outcomes(failed=1)
    assert "memory regressed: tiny-llama / none" in first_lines(regressed)
    assert "host.weights" in first_lines(regressed)
    assert "(+1 B, exact)" in first_lines(regressed)
    junit = (pytester.path / "junit.xml").read_text()
    assert '<property name="llmload.verdict" value="regressed"' in junit
    assert '<property name="llmload.host.weights"' in junit
    report = json.loads((pytester.path / "run.json").read_text())
    assert report["runs"][0]["verdict"] == "regressed"

    project("--llm-tolerance=host.weights=1MiB").assert_outcomes(passed=1)
    project("--llm-record-missing").assert_outcomes(failed=1)
    accepted = project("--llm-update-baselines")
    accepted.assert_outcomes(passed=1)
    accepted.stdout.fnmatch_lines(["accepted:", "*host.weights*"])

    # What is missing is written, and what regressed fails the test all the same.
    stored = json.loads(baseline.read_text())
    del stored["memory"]["weights.logical"]
    stored["memory"]["host.weights"] -= 1
    baseline.write_text(json.dumps(stored))
    mixed = project("--llm-record-missing", "--llm-record-repeats=1")
    mixed.assert_outcomes(failed=1)
    stored = json.loads(baseline.read_text())
    assert "weights.logical" in stored["memory"]
    stored["memory"]["host.weights"] += 1 + 4096
    baseline.write_text(json.dumps(stored))
    improved = project()
    improved.assert_outcomes(passed=1)
    improved.stdout.fnmatch_lines(["improved, not accepted*"])
    project("--llm-strict").assert_outcomes(failed=1)


def test_a_dropped_double_quantisation_is_caught_and_explained(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    """In a user's own loader: nothing is asked for there that could be found missing, only the baseline knows."""
    pytester.makepyfile(
        serving="""
        import torch, transformers
        def load_model(spec):
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            )
            return transformers.AutoModelForCausalLM.from_pretrained(spec.model, quantization_config=config)
        """,
        planted=NO_DOUBLE_QUANT,
        test_it="""
        import pytest
        @pytest.mark.strategy("loader", target="serving:load_model")
        @pytest.mark.quant("nf4")
        def test_production(llm, memory_baseline):
            memory_baseline.check(llm)
        """,
    )
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    project().assert_outcomes(passed=1)
    result = project("--llm-import=planted")
    result.assert_outcomes(failed=1)
    assert "double quant dropped" in result.stdout.str()
    # Asked for by the marker, it is no regression but a strategy that was not applied.
    pytester.makepyfile(
        test_it="""
        import pytest
        @pytest.mark.strategy("loader", target="serving:load_model")
        @pytest.mark.quant("nf4", double_quant=True)
        def test_production(llm): pass
        """
    )
    project().assert_outcomes(passed=1)
    result = project("--llm-import=planted")
    result.assert_outcomes(failed=1)
    assert "was not applied" in first_lines(result)


def test_another_workload_is_incomparable_and_says_so(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], baseline: Path
) -> None:
    pytester.makepyfile(MEMORY)
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    result = project("--llm-workload=2x8+3")
    result.assert_outcomes(failed=1)
    text = first_lines(result, 4)
    assert "incomparable" in text
    assert "1x8+3" in text
    assert "2x8+3" in text
    project("--llm-record-missing", "--llm-workload=2x8+3").assert_outcomes(failed=1)
    project("--llm-update-baselines", "--llm-record-repeats=1", "--llm-workload=2x8+3").assert_outcomes(passed=1)
    assert json.loads(baseline.read_text())["workload"] == "2x8+3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "memo', "none.json"),
        ('{"schema": 99}', "99"),
        ("[]", "none.json"),
    ],
)
def test_a_baseline_that_cannot_be_read_is_an_error_of_the_setup(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], baseline: Path, content: str, message: str
) -> None:
    pytester.makepyfile(MEMORY)
    baseline.parent.mkdir(parents=True)
    baseline.write_text(content)
    for mode in ((), ("--llm-update-baselines",)):
        result = project(*mode)
        result.assert_outcomes(errors=1)
        assert message in result.stdout.str()
        assert "Traceback" not in result.stdout.str()
    assert baseline.read_text() == content, "nothing is lost"


def test_a_baseline_of_another_spec_is_refused(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], baseline: Path
) -> None:
    pytester.makepyfile(QUANTISED)
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=1)
    baseline = baseline.with_name("nf4.json")
    baseline.write_text(baseline.read_text().replace('"quant": "nf4"', '"quant": "fp4"'))
    result = project()
    result.assert_outcomes(failed=1)
    assert "incomparable" in first_lines(result)


def test_stale_baselines_are_listed_and_an_error_under_strict(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], baseline: Path
) -> None:
    pytester.makeini("[pytest]\nllm_workload = 1x8+3\n")
    pytester.makepyfile(QUANTISED.replace('"nf4"', '"none", "nf4"'))
    project("--llm-update-baselines", "--llm-record-repeats=1").assert_outcomes(passed=2)
    pytester.makepyfile(MEMORY)
    result = project("--llm-report=run.json")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["stale baselines*", "*nf4.json*"])
    strict = project("--llm-strict", "--junitxml=junit.xml")
    strict.assert_outcomes(passed=1, errors=1)
    strict.stdout.fnmatch_lines(["ERROR llmload::baselines*"])
    assert strict.ret == pytest.ExitCode.TESTS_FAILED
    assert 'errors="1"' in (pytester.path / "junit.xml").read_text()
    project("--llm-strict", "-k", "memory").assert_outcomes(passed=1)
    dry = pytester.run(sys.executable, "-m", "pytest_llmload.cli", "prune", "run.json", "--dry-run")
    dry.stdout.fnmatch_lines(["would delete *nf4.json"])
    assert (baseline.parent / "nf4.json").exists()
    pytester.run(sys.executable, "-m", "pytest_llmload.cli", "prune", "run.json").stdout.fnmatch_lines(
        ["deleted *nf4.json"]
    )
    assert not (baseline.parent / "nf4.json").exists()
    assert baseline.exists()


def test_what_a_test_checks_it_owns_however_it_came_by_it(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makeini("[pytest]\nllm_workload = 1x8+3\n")
    pytester.makepyfile(
        """
        def test_body(llm_load, memory_baseline): memory_baseline.check(llm_load(dtype="bf16"))
        def test_late(llm, request): request.getfixturevalue("memory_baseline").check(llm)
        """
    )
    project("--llm-record-missing", "--llm-record-repeats=1", "--llm-report=run.json").assert_outcomes(passed=2)
    report = json.loads((pytester.path / "run.json").read_text())
    assert report["stale"] == []
    assert [run["verdict"] for run in report["runs"]] == ["recorded", "recorded"]


def test_a_recording_whose_repeat_fails_says_that_it_was_the_repeat(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult], baseline: Path
) -> None:
    pytester.makepyfile(
        serving="""
        import pathlib, transformers
        def load_model(spec):
            first = pathlib.Path("first")
            if first.exists():
                raise RuntimeError("not twice")
            first.touch()
            return transformers.AutoModelForCausalLM.from_pretrained(spec.model)
        """,
        test_it="def test_production(llm, memory_baseline): memory_baseline.check(llm)",
    )
    result = project("--llm-loader=serving:load_model", "--llm-update-baselines", "--llm-report=run.json")
    result.assert_outcomes(failed=1)
    said = "not recorded, since the load was repeated for it and did not end in a model this time"
    assert said in first_lines(result)
    assert "not twice" in result.stdout.str()
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert (run["verdict"], run["messages"]) == ("missing", [said])
    assert not baseline.parent.exists()


def test_a_run_in_which_nothing_was_measured_is_an_error(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.gpu_count(2)
        def test_a(llm): pass
        """
    )
    result = project("-rsE")
    result.assert_outcomes(skipped=1, errors=1)
    result.stdout.fnmatch_lines(
        ["SKIPPED*test_a_run_in*py:2: needs 2 GPUs, this run sees 0*", "ERROR llmload::nothing-measured*"]
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    required = project("--llm-require-hardware")
    required.assert_outcomes(errors=2)
    assert "needs 2 GPUs" in required.stdout.str()


def test_limits_need_no_baseline(pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]) -> None:
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.memory_ceiling(host="4GiB")
        @pytest.mark.latency_budget(load="10min", ttft="10min", per_token="10min")
        def test_within(llm): pass
        @pytest.mark.memory_ceiling(host="1MiB", phase="load")
        def test_memory(llm): pass
        @pytest.mark.latency_budget(per_token="1us")
        def test_time(llm): pass
        @pytest.mark.memory_ceiling(gpu="1MiB")
        def test_no_gpu(llm): pass
        @pytest.mark.memory_ceiling(host="1MiB")
        def test_own_failure_first(llm): assert 1 == 2
        @pytest.mark.memory_ceiling(host="4GiB")
        @pytest.mark.latency_budget(load="1us")
        def test_factory(llm_load):
            llm_load(shared=True)
            with open("went_on.txt", "w"): pass
        """
    )
    result = project("--llm-report=run.json", "--junitxml=junit.xml")
    result.assert_outcomes(passed=2, failed=4)
    assert (pytester.path / "went_on.txt").exists()
    assert '<property name="llmload.verdict" value="over_limit"' in (pytester.path / "junit.xml").read_text()
    text = result.stdout.str()
    assert "memory ceiling exceeded: the host held" in text
    assert "while loading" in text
    assert "latency budget exceeded: per_token is" in text
    assert "latency budget exceeded: load is" in text
    assert "no gpu memory in this run" in text
    assert "assert 1 == 2" in text
    result.stdout.fnmatch_lines(["*variant*verdict", "*none* over limit"])
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert run["verdict"] == "over_limit"
    line = project("--tb=line", "-k", "test_memory")
    line.stdout.fnmatch_lines(["*test_limits_need_no_baseline.py:5: memory ceiling exceeded: the host held*"])
    project("--llm-strict", "-k", "no_gpu").assert_outcomes(failed=1, deselected=5)


def test_inline_gates_nothing_records_nothing_and_has_the_model(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        def test_a(llm, memory_baseline):
            assert memory_baseline.check(llm) is None
            assert type(llm.model).__name__ == "LlamaForCausalLM"
            assert llm.run(lambda model, tokenizer: len(list(model.parameters()))) > 10
        """
    )
    project("--llm-isolation=inline", "--llm-update-baselines").assert_outcomes(passed=1)
    assert not (pytester.path / "baselines").exists()
    pytester.makepyfile("def test_a(llm): llm.model")
    result = project()
    result.assert_outcomes(failed=1)
    assert "the model lives in a process of its own" in result.stdout.str()


def test_a_wrong_argument_of_a_check_is_one_sentence_and_shows_none_of_our_code(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        def test_typo(llm, memory_baseline): memory_baseline.check(llm, metrics=["typo"])
        def test_other(llm, memory_baseline): memory_baseline.check(llm, metrics=["ttft"])
        def test_text(llm, latency_baseline): latency_baseline.check(llm, metrics="load")
        def test_none(llm, latency_baseline): latency_baseline.check(llm, metrics=[])
        def test_unit(llm, memory_baseline): memory_baseline.check(llm, tolerance={"gpu.settled": "5ms"})
        def test_name(llm, memory_baseline): memory_baseline.check(llm, tolerance={"typo": "1%"})
        """
    )
    result = project("--llm-isolation=inline", "--llm-report=run.json")
    result.assert_outcomes(failed=6)
    text = result.stdout.str()
    for message in (
        "ValueError: memory_baseline.check: unknown metric 'typo'; known: gpu.weights",
        "ValueError: memory_baseline.check: 'ttft' is a figure of the time baseline: use latency_baseline.check",
        "ValueError: latency_baseline.check: metrics='load' is not a list of metrics: omit it, or name some",
        "ValueError: latency_baseline.check: metrics=[] is not a list of metrics",
        "ValueError: memory_baseline.check: gpu.settled: '5ms' is not a tolerance here: write '1%', '8MiB'",
    ):
        assert f"E   {message}" in text
    assert text.count("unknown metric 'typo'") >= 2
    assert "pytest_llmload/host/checks/baselines.py" not in text
    notes = json.loads((pytester.path / "run.json").read_text())["notes"]
    assert "inline: loads lived in the pytest process, nothing was gated or recorded" in notes


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_loaded(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        """
        def test_a(llm, memory_baseline): memory_baseline.check(llm)
        """
    )
    # A file where the folder should be: root may write into read-only folders.
    (pytester.path / "taken").touch()
    result = project("--llm-update-baselines", "--llm-baselines=taken", "--llm-report=run.json")
    # The test's, and the run's: nothing was measured.
    result.assert_outcomes(errors=2)
    text = result.stdout.str()
    assert "Not a directory in " in text
    assert "The above exception" not in text
    assert json.loads((pytester.path / "run.json").read_text())["runs"][0]["load"] == ""


def test_a_report_that_cannot_be_written_is_an_error_of_the_run(
    pytester: pytest.Pytester, project: Callable[..., pytest.RunResult]
) -> None:
    pytester.makepyfile(
        conftest="def pytest_llmload_load_finished(config, result): result.phase_peaks['mine'] = {'gpu.0': set()}",
        test_it="def test_a(llm): pass",
    )
    result = project("--llm-report=run.json")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["cannot write *run.json: Object of type set is not JSON serializable"])
