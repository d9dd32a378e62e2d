"""Extensions by users and contributors, each in one file: shown, compared, reported and documented like ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]

REPORT_FORMAT = """
    from pytest_llmload.reports.formats import WRITERS

    def verdict_lines(document):
        '''One line a load: its id and its verdict.'''
        return "".join(f"{run['id']},{run['verdict']}\\n" for run in document["runs"])

    WRITERS[".csv"] = verdict_lines
"""


def test_a_report_format_is_one_entry_of_a_table(pytester: pytest.Pytester, project: Run) -> None:
    pytester.makeconftest(REPORT_FORMAT)
    pytester.makepyfile("def test_a(llm): pass")
    project("--llm-report=out/run.csv").assert_outcomes(passed=1)
    assert (pytester.path / "out" / "run.csv").read_text() == "tiny-llama-none,measured\n"
    shown = " ".join(project("--help").stdout.str().split())
    assert ".csv. Repeatable." in shown
    refused = project("--llm-report=run.pdf")
    refused.stderr.fnmatch_lines(["*--llm-report: 'run.pdf': its suffix '.pdf' is not the suffix of a report format*"])
