"""Each fault ends as ``docs/faults.md`` says, in one run, which leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from family import start, wait_for
from faults import ELSEWHERE, FAULTS, Elsewhere, sources, table, table_of_elsewhere
from warm_template import Template

from pytest_llmload.system.scratch import LOAD, Scratch, remove_abandoned

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"

#: Elements of JUnit's test case -> outcome.
_OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}


def test_the_page_has_the_tables() -> None:
    for each in (table(), table_of_elsewhere()):
        assert each in PAGE.read_text(encoding="utf-8"), each


@pytest.mark.parametrize("fault", ELSEWHERE, ids=lambda fault: fault.what)
def test_what_is_planted_elsewhere_is_planted_there(fault: Elsewhere) -> None:
    place, _, name = fault.test.partition("::")
    folder = ROOT if place.startswith("benchmarks") else ROOT / "tests"
    assert f"def {name or 'main'}(" in (folder / place).read_text(encoding="utf-8")


def test_every_fault_ends_as_the_table_says(
    pytester: pytest.Pytester,
    project: Callable[..., pytest.RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("LLM_ENDPOINT_KEY", "swordfish-17")
    pytester.makepyfile(**sources())
    result = project("--junitxml=junit.xml", "--llm-report=run.json", "--llm-report=run.html", "-rA")
    text = result.stdout.str()
    cases = {case.get("name", ""): case for case in ElementTree.parse(pytester.path / "junit.xml").iter("testcase")}
    wrong = []
    for fault in FAULTS:
        case = next(case for name, case in cases.items() if name.partition("[")[0] == f"test_{fault.name}")
        ends = {child.tag: f"{child.get('message')} {child.text}" for child in case}
        found = (
            "failed"
            if "failure" in ends
            else "skipped"
            if "skipped" in ends
            else "error"
            if "error" in ends
            else "passed"
        )
        if found != fault.outcome or fault.told not in " ".join(ends.values()):
            wrong.append((fault.name, found, ends))
    assert not wrong, text
    # The short summary begins with the cause.
    result.stdout.fnmatch_lines(["FAILED *::test_exits* - _pytest.outcomes.Exit: enough"])
    written = [text, *((pytester.path / name).read_text() for name in ("junit.xml", "run.json", "run.html"))]
    for each in written:
        assert "swordfish-17" not in each
        assert "\x1b" not in each
        assert "\u202e" not in each
    assert 'Traceback (most recent call last):\n  File "<string>"' not in text
    assert not [path for path in (tmp_path / "tmp").iterdir() if "llmload" in path.name]
    assert not list(tmp_path.rglob("core"))
    assert not Path("/proc", (pytester.path / "child.txt").read_text().strip(), "exe").exists()


def test_no_figure_and_no_deadline_is_taken_from_the_wall_clock() -> None:
    sources = (ROOT / "pytest_llmload").rglob("*.py")
    assert [path for path in sources if "time.time()" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_a_run_that_is_terminated_leaves_what_was_measured(
    pytester: pytest.Pytester, checkpoint_cache: Path, warm_template: Template, workers: list[str]
) -> None:
    """As a cancelled job of a CI service is."""
    pytester.makepyfile(
        conftest="""
        import signal
        import pytest

        def pytest_configure(config):
            if not hasattr(config, "workerinput"):
                config.pluginmanager.register(Stops())

        class Stops:
            @pytest.hookimpl(trylast=True)
            def pytest_runtest_logreport(self, report):
                if report.when == "teardown":
                    open("started", "w").close()
                    signal.pause()
        """,
        test_it="""
        def test_first(llm): assert llm.outcome == "loaded"
        def test_second(llm): assert llm.outcome == "loaded"
        """,
    )
    os.mkfifo(pytester.path / "started")
    reports = [f"--llm-report=run.{kind}" for kind in ("json", "html", "md")]
    options = ["--llm-workload=1x8+3", *reports, *workers]
    process = start(pytester.path, checkpoint_cache, *options, template=warm_template)
    try:
        wait_for(pytester.path / "started", process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    report = json.loads((pytester.path / "run.json").read_text())
    (run,) = report["runs"]
    assert run["load"] == "loaded"
    assert run["metrics"]["host.weights"] > 0
    assert "the run had not ended when this was written" in report["notes"]
    for name in ("run.html", "run.md"):
        text = (pytester.path / name).read_text(encoding="utf-8")
        assert "tiny-llama" in text
        assert "the run had not ended when this was written" in text


def test_a_killed_loads_folder_is_removed_and_a_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living = Scratch(LOAD)
    code = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]; "
        "from pytest_llmload.system.scratch import *; Scratch(LOAD); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    remove_abandoned(LOAD)
    assert list(tmp_path.iterdir()) == [living.path]
    living.close()


def test_a_full_temporary_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pytest_llmload import MachineError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(MachineError, match=r"cannot make a temporary folder: No such file or directory \(.*missing"):
        Scratch(LOAD)
