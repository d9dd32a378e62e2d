"""The HTML report: one file that needs no network, no mouse and no script."""

from __future__ import annotations

from typing import Any


def text(document: dict[str, Any]) -> str:
    """Charts and tables of every load in one file, to open in a browser without a network."""
    from pytest_llmload.reports.html.page import render
    from pytest_llmload.reports.reading import parse

    return render(parse(document, "the report"))
