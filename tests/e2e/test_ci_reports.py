"""What CI systems and other tools' reports are given, by runs of the plugin beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Project = Callable[..., pytest.RunResult]

TESTS = """
    import pytest

    @pytest.mark.strategy("loader", target="serving:load_model")
    def test_production(llm, memory_baseline):
        memory_baseline.check(llm)

    @pytest.mark.strategy("loader", target="serving:broken")
    def test_broken(llm):
        pass

    @pytest.mark.strategy("loader", target="serving:load_model")
    def test_own(llm):
        assert 3 == len("four")

    @pytest.mark.skip
    def test_of_something_else():
        pass
"""
SERVING = """
    import transformers

    def load_model(spec):
        return transformers.AutoModelForCausalLM.from_pretrained(spec.model)

    def broken(spec):
        print("::error::planted by a log\\n::set-output name=a::b")
        raise OSError("100% of the disk, is full: a\\nb")
"""
COMMAND = re.compile(r"^::error (?P<properties>[^:]*)::(?P<message>.*)$", re.MULTILINE)


@pytest.fixture
def github(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of GitHub Actions whose project is in a folder of the repository; the job's summary."""
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path.parent))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    pytester.makepyfile(test_loads=TESTS, serving=SERVING)
    return summary


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["one", "xdist"])
def test_github_is_told_without_configuration(
    pytester: pytest.Pytester, project: Project, github: Path, workers: tuple[str, ...]
) -> None:
    result = project(*workers, *(("-p", "xdist") if workers else ()))
    result.assert_outcomes(failed=3, skipped=1)
    found = {match["properties"]: match["message"] for match in COMMAND.finditer(result.stdout.str())}
    folder = pytester.path.name
    places = {re.sub(r",title=.*", "", properties) for properties in found}
    assert places == {f"file={folder}/test_loads.py,line={line}" for line in (3, 7, 11)}
    broken = next(message for message in found.values() if "OSError" in message)
    assert "100%25 of the disk, is full: a%0A" in broken
    assert any("memory baseline missing" in message for message in found.values())
    lines = result.stdout.str().splitlines()
    first, last = (lines.index(line) for line in ("::error::planted by a log", "::set-output name=a::b"))
    begin = max(at for at, line in enumerate(lines[:first]) if line.startswith("::stop-commands::"))
    token = lines[begin].removeprefix("::stop-commands::")
    assert f"::{token}::" in lines[last:], "the runner obeys nothing that a log says"
    text = github.read_text()
    assert text.startswith("### Model loading: 2 of 2 loads failed")
    assert "memory baseline missing" in text
    assert re.search(r"^test_loads\.py::test_own\[\S+\]: (AssertionError: )?assert 3 == 4$", text, re.MULTILINE)


def obeyed(lines: list[str]) -> list[str]:
    """Return the lines that GitHub's runner takes for commands: it looks for ``::`` behind blanks, and for ``##[``."""
    found, token = [], ""
    for line in lines:
        command = line.lstrip()
        if token:
            token = "" if command == f"::{token}::" else token
        elif command.startswith("::stop-commands::"):
            token = command.removeprefix("::stop-commands::")
        elif re.match(r"::[\w-]+( [^:]*)?::", command) or "##[" in command:
            found.append(command)
    assert not token, "the runner obeys again in the end"
    return found


def test_no_text_from_outside_is_a_command(pytester: pytest.Pytester, project: Project, github: Path) -> None:
    pytester.makepyfile(
        test_loads="""
        import pytest

        def speak(model, tokenizer):
            print("::error::out")
            print("##[error]old")

        def fail(model, tokenizer):
            raise ValueError("\\n  ::warning::raised\\n::add-mask::a")

        def test_run(llm):
            llm.run(speak)
            print("::notice::test")
            llm.run(fail)

        @pytest.mark.strategy("loader", target="serving:broken")
        def test_broken(llm): pass
        """
    )
    pytester.makeconftest(
        """
        def pytest_terminal_summary(terminalreporter):
            terminalreporter.write_line("::notice::of another plugin")
        """
    )
    result = project("-rA")
    result.assert_outcomes(failed=2)
    text = result.stdout.str()
    for planted in ("::error::out", "##[error]old", "::warning::raised", "::notice::test", "::error::planted by a log"):
        assert planted in text
    commands = obeyed(text.splitlines())
    assert "::notice::of another plugin" in commands
    ours = {"::group::", "::endgroup::", "::error file=", "::notice::of another plugin"}
    assert [line for line in commands if not line.startswith(tuple(ours))] == []
    assert len([line for line in commands if line.startswith("::error file=")]) == 2


def test_an_error_of_the_run_as_a_whole_is_told_too(pytester: pytest.Pytester, project: Project, github: Path) -> None:
    result = project("--llm-device=cuda")
    assert result.ret == 1
    assert "::error title=ERROR llmload%3A%3Anothing-measured::" in result.stdout.str()


@pytest.mark.parametrize("workers", [(), ("-n1", "-p", "xdist")], ids=["one", "xdist"])
def test_a_wrong_marker_is_an_annotation(
    pytester: pytest.Pytester, project: Project, github: Path, workers: tuple[str, ...]
) -> None:
    pytester.makepyfile(
        test_loads="""
        import pytest

        @pytest.mark.quant("int3")
        def test_a(llm): pass
        """
    )
    result = project(*workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (message,) = (found["message"] for found in COMMAND.finditer(result.stdout.str()))
    assert message.startswith("test_loads.py::test_a: quant")
    assert "int3" in message


def test_elsewhere_nothing_is_written_for_github(
    pytester: pytest.Pytester, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    pytester.makepyfile(test_loads="def test_a(llm, memory_baseline): memory_baseline.check(llm)")
    assert "::" not in "".join(line for line in project().outlines if line.startswith("::"))


def test_gitlab_and_other_tools_get_the_figures(pytester: pytest.Pytester, project: Project) -> None:
    pytester.makepyfile(test_loads=TESTS, serving=SERVING)
    reports = ("--html=report.html", "--self-contained-html", "--alluredir=allure", "--json-report")
    result = project(*reports, "--llm-report=gl.codequality.json", "--junitxml=junit.xml", others=True)
    result.assert_outcomes(failed=3, skipped=1)
    issues = json.loads((pytester.path / "gl.codequality.json").read_text())
    assert {issue["check_name"] for issue in issues} == {"llmload.missing", "llmload.failed"}
    assert {issue["location"]["lines"]["begin"] for issue in issues} == {3, 7}
    assert all(issue["location"]["path"] == "test_loads.py" for issue in issues)
    assert len({issue["fingerprint"] for issue in issues}) == 2
    tests = json.loads((pytester.path / ".report.json").read_text())["tests"]
    properties = {name for entry in tests[0]["user_properties"] for name in entry}
    assert {"llmload.verdict", "llmload.host.weights"} <= properties
    assert "host.weights" in (pytester.path / "report.html").read_text()
    attached = [path.read_text() for path in (pytester.path / "allure").glob("*-attachment.txt")]
    assert any("host.weights" in text and "MiB" in text for text in attached)
    assert 'name="llmload.host.weights"' in (pytester.path / "junit.xml").read_text()
