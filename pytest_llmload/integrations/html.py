"""pytest-html: a test's row shows the figures of its load.

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
    report = yield
    state = existing_state(item.config)
    spec = state.loaded_by(item) if state is not None else None
    if state is not None and spec is not None and report.when == "call":
        lines = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows(state.run(spec))
        )
        extra = {"name": "llmload", "format_type": "html", "content": f"<table>{lines}</table>"}
        extra |= {"mime_type": "", "extension": ""}
        # As plain data it survives the way from an xdist worker.
        report.extras = [*getattr(report, "extras", []), extra]  # type: ignore[attr-defined]
    return report
