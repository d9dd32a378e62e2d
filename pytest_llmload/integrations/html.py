"""pytest-html: show the figures of its load in each test's row.

https://pytest-html.readthedocs.io/en/latest/user_guide.html#extra-content
"""

from __future__ import annotations

from collections.abc import Generator
from html import escape

import pytest

from pytest_llmload.host.run.stash import existing_state
from pytest_llmload.reports.figure_list import rows


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the figures of the test's load to its report.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_makereport
    """
    report = yield
    state = existing_state(item.config)
    spec = state.loaded_by(item) if state is not None else None
    if state is not None and spec is not None and report.when == "call":
        lines = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows(state.run(spec))
        )
        extra = {"name": "llmload", "format_type": "html", "content": f"<table>{lines}</table>"}
        extra |= {"mime_type": "", "extension": ""}
        # Plain data survives the way from an xdist worker.
        report.extras = [*getattr(report, "extras", []), extra]  # type: ignore[attr-defined]
    return report
