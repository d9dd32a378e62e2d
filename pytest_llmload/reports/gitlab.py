"""Write GitLab's code quality report: it shows each failed load in the merge request and at its line in the diff.

https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
"""

from __future__ import annotations

import json
from typing import Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.runs import Run
from pytest_llmload.core.verdicts import ERROR
from pytest_llmload.reports import figures
from pytest_llmload.reports.reading import parse

#: Characters of a description; the widget shows one line.
_TEXT = 1_000


def text(document: dict[str, Any]) -> str:
    """Return GitLab's code quality report of the failed loads, for the merge request's widget."""
    failed = figures.failed(parse(document, "the report").runs)
    return json.dumps([_issue(run) for run in failed], indent=1, ensure_ascii=False) + "\n"


def _issue(run: Run) -> dict[str, Any]:
    # A test outside the repository, such as the ready-made suite's, does not have a line there: name the baseline.
    place = next(iter(run.locations.values()), f"{run.baseline or 'baselines'}:1")
    path, _, line = place.rpartition(":")
    cause = " ".join(figures.cause(run).split())
    return {
        "description": (cause or f"{run.spec.id}: {run.fate}")[:_TEXT],
        "check_name": f"llmload.{run.fate}",
        # Stays the same as long as the same load fails in the same way, so that the widget recognises old failures.
        "fingerprint": digest([run.spec.name, run.spec.slug, run.device_key, run.fate], 40),
        "severity": "critical" if run.outcome == ERROR else "major",
        "location": {"path": path, "lines": {"begin": int(line)}},
    }
