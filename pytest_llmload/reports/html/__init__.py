"""The HTML report: one file that works without network, mouse and scripts."""

from __future__ import annotations

from typing import Any


def text(document: dict[str, Any]) -> str:
    """Return charts and tables of every load in one file, which a browser opens without a network."""
    from pytest_llmload.reports.html.page import render
    from pytest_llmload.reports.reading import parse

    return render(parse(document, "the report"))
