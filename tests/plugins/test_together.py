"""A gate in a project that has the usual plugins of pytest, all loaded at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

Run = Callable[..., pytest.RunResult]

WANTED = [
    re.split("==", line)[0]
    for line in (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
#: What coverage needs to measure a load's process (docs/plugins.md).
COVERED = """
    [run]
    source = ours
    patch = subprocess, fork, _exit
"""
OURS = """
    from transformers import AutoModelForCausalLM

    def load(spec):
        return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")

    def never():
        return 1
"""
#: Loads that hold a copy of a weight, planted by --llm-import.
FAULT = """
    import transformers
    COPIES = []
    _load = transformers.PreTrainedModel.from_pretrained.__func__
    def keeps_a_copy(cls, *args, **kwargs):
        found = _load(cls, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        COPIES.extend(param.detach().clone() for param in model.parameters())
        return found
    transformers.PreTrainedModel.from_pretrained = classmethod(keeps_a_copy)
"""
TESTS = """
    import datetime

    import pytest

    @pytest.mark.quant("none", "nf4")
    @pytest.mark.timeout(300)
    @pytest.mark.flaky(reruns=1)
    @pytest.mark.order(1)
    def test_memory(llm, memory_baseline):
        memory_baseline.check(llm)

    @pytest.mark.strategy("loader", target="ours:load")
    def test_loader(llm, memory_baseline):
        memory_baseline.check(llm)

    def says(model, tokenizer):
        print("from the load's process")
        return datetime.date.today().year

    @pytest.mark.asyncio
    async def test_coroutine(llm):
        assert len(llm.generate("Hello", max_new_tokens=2).tokens) == 2

    @pytest.mark.anyio
    async def test_anyio(llm, anyio_backend):
        assert llm.outcome == "loaded"

    def test_frozen(llm, freezer, capsys):
        freezer.move_to("2001-01-01")
        assert llm.run(says) > 2001 == datetime.date.today().year
        assert capsys.readouterr().out == "from the load's process\\n"

    def test_traveller(llm, time_machine):
        time_machine.move_to(0)
        assert llm.run(says) > 2001

    def test_mocked(llm, mocker):
        mocker.patch("os.getcwd", return_value="/nowhere")
        assert llm.run(says) > 2001

    def test_parts(llm, subtests, check, snapshot):
        for name in ("host.weights", "weights.logical"):
            with subtests.test(name):
                assert llm.metrics[name] > 0
        check.equal(llm.metrics["host.weights"], llm.metrics["host.weights"])

    def test_speed(llm, llm_benchmark):
        assert llm_benchmark(says, rounds=2) > 2001

    def test_plain(data_regression, httpx_mock, extras, json_metadata):
        pass

    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""
COUNT = 11


@pytest.fixture
def tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """Return a project that uses them, and no more than a warning of theirs."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(ours=OURS, planted=FAULT, test_it=TESTS)
    (pytester.path / ".coveragerc").write_text("\n".join(line.strip() for line in COVERED.splitlines()))
    return pytester


def test_all_are_loaded(tests: pytest.Pytester, project: Run) -> None:
    assert len(WANTED) >= 30
    names = {dist.metadata["Name"].lower().replace("_", "-") for dist in metadata.distributions()}
    assert {name.lower() for name in WANTED} <= names
    header = project("--collect-only", "-p", "no:sugar", randomly=True).stdout.str()
    loaded = re.search(r"^plugins: (.*)$", header, re.MULTILINE)
    assert loaded is not None
    # syrupy and freezegun's are named otherwise than their packages.
    count = len(loaded.group(1).split(", "))
    assert count >= len(WANTED) - 1, loaded.group(1)


def test_a_clean_gate_is_green_and_a_fault_is_red(tests: pytest.Pytester, project: Run) -> None:
    recorded = project("-n", "2", "--llm-update-baselines", randomly=True)
    recorded.assert_outcomes(passed=COUNT)
    clean = project(
        "--reruns=1", "--timeout=300", "--html=report.html", "--self-contained-html", "--json-report",
        "--junitxml=j.xml", "--alluredir=allure", "--cov", "--cov-report=json:cov.json", "--llm-report=run.json",
        "--instafail",
        randomly=True,
    )  # fmt: skip
    clean.assert_outcomes(passed=COUNT)
    runs = {run["id"]: run["verdict"] for run in json.loads((tests.path / "run.json").read_text())["runs"]}
    assert runs == {
        "tiny-llama-none": "ok",
        "tiny-llama-nf4": "ok",
        "tiny-llama-loader+ours.load": "ok",
    }
    # The load's process was measured too.
    files = json.loads((tests.path / "cov.json").read_text())["files"]
    assert files["ours.py"]["executed_lines"] == [1, 3, 4, 6]
    assert files["ours.py"]["missing_lines"] == [7]
    assert not list(tests.path.glob(".coverage.*"))
    assert (
        "host.weights" in (tests.path / "report.html").read_text()
        or "tiny-llama" in (tests.path / "report.html").read_text()
    )
    assert (tests.path / ".report.json").exists()
    assert list((tests.path / "allure").glob("*-result.json"))
    red = project("-n", "2", "--llm-import=planted", "--llm-report=red.json", randomly=True)
    red.assert_outcomes(failed=3, passed=COUNT - 3)
    verdicts = {run["id"]: run["verdict"] for run in json.loads((tests.path / "red.json").read_text())["runs"]}
    assert set(verdicts.values()) == {"regressed"}
    assert "planted.COPIES" in red.stdout.str()


def test_a_time_out_is_that_of_the_test_that_had_it(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    os.mkfifo(pytester.path / "phases")
    pytester.makepyfile(
        conftest="""
        import os
        from pytest_llmload.host.loads.processes import LoadProcess

        def told(process, phase):
            process.__dict__["phase"] = phase
            # Opened for reading too: it waits for no reader, and keeps what is written.
            os.write(PHASES, f"{phase}\\n".encode())

        PHASES = os.open("phases", os.O_RDWR)
        LoadProcess.phase = property(lambda process: process.__dict__["phase"], told)
        """,
        slow="""
        import os, signal
        from pathlib import Path
        from transformers import AutoModelForCausalLM

        def wait_too_long(phase):
            # The alarm that pytest-timeout has set, without the wait for it: once pytest knows which phase this is.
            with open("phases", "rb", buffering=0) as phases:
                while phases.readline() != phase:
                    pass
            os.kill(int(Path("pid").read_text()), signal.SIGALRM)
            signal.pause()

        def load(spec):
            if not os.path.exists("once"):
                open("once", "w").close()
                print("waits for a file server", flush=True)
                wait_too_long(b"load\\n")
            return AutoModelForCausalLM.from_pretrained(spec.model, dtype="auto")

        def waits(model, tokenizer): wait_too_long(b"run\\n")
        """,
        test_it="""
        import os
        from pathlib import Path
        import pytest

        Path("pid").write_text(str(os.getpid()))
        pytestmark = pytest.mark.strategy("loader", target="slow:load")

        @pytest.mark.timeout(250)
        def test_first(llm): assert llm.outcome == "loaded"

        def test_second(llm): assert llm.outcome == "loaded"

        @pytest.mark.timeout(240)
        def test_third(llm):
            llm.run("slow:waits")

        def test_fourth(llm): assert llm.generate("x", max_new_tokens=1).tokens
        """,
    )
    result = project("-p", "no:sugar", "--llm-report=run.json")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*_ test_first*",
            "the load timed out: tiny-llama / loader+slow.load on cpu-*",
            "  because  killed in phase 'load': Timeout (>250.0s) from pytest-timeout.",
            "    waits for a file server",
            "*_ test_third*",
            "test_it.py:15: in test_third",
            "the load timed out: *",
            "  because  killed in phase 'run': Timeout (>240.0s) from pytest-timeout.",
            "FAILED *::test_first* - because killed in phase 'load': Timeout (>250.0s)*",
        ]
    )
    text = result.stdout.str()
    assert "protocol.py" not in text
    assert "processes.py" not in text
    (run,) = json.loads((pytester.path / "run.json").read_text())["runs"]
    assert (run["load"], run["outcome"], run["verdict"]) == ("loaded", "fail", "measured")


def test_codspeed_measures_llm_benchmark(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(
        """
        import pytest

        def count(model, tokenizer, much): return much

        @pytest.mark.benchmark(group="counting")
        def test_speed(llm, llm_benchmark):
            assert llm_benchmark(count, 3, rounds=4) == 3

        def test_else(llm): pass
        """
    )
    result = project("--codspeed", "--codspeed-mode=walltime", "-p", "no:sugar")
    result.assert_outcomes(passed=1, deselected=1)
    (written,) = (pytester.path / ".codspeed").glob("*.json")
    (found,) = json.loads(written.read_text())["benchmarks"]
    assert found["stats"]["rounds"] == 4


def test_repeated_and_split_tests_share_their_load(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(
        conftest="""
        def pytest_llmload_load_finished(config, result):
            with open("loads.txt", "a") as log:
                log.write("loaded\\n")
        """,
        test_it="""
        def test_a(llm): pass
        def test_b(llm): pass
        """,
    )
    project("--count=2", "--splits=2", "--group=1", "-p", "no:sugar", randomly=True).assert_outcomes(
        passed=2, deselected=2
    )
    assert (pytester.path / "loads.txt").read_text() == "loaded\n"
    blocked = project("--disable-socket", "-p", "no:sugar", "-k", "test_a")
    # The test's, and that of a run that measured nothing.
    blocked.assert_outcomes(errors=2, deselected=1)
    blocked.stdout.fnmatch_lines(["*pytest-socket*--allow-unix-socket*"])
    project("--disable-socket", "--allow-unix-socket", "-p", "no:sugar", "-k", "test_a").assert_outcomes(
        passed=1, deselected=1
    )
