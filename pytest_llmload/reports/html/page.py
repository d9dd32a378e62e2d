"""Put the HTML report together, small enough that a browser opens the file at once."""

from __future__ import annotations

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import counted
from pytest_llmload.core.verdicts import SEVERITY
from pytest_llmload.reports import figures
from pytest_llmload.reports.headline import headline
from pytest_llmload.reports.html import details, sections
from pytest_llmload.reports.html.elements import chip, el, text_of
from pytest_llmload.reports.layout import change, joined, movement
from pytest_llmload.reports.reading import Report

#: Bytes that a report never exceeds, and bytes that a browser opens at once.
MOST, COMFORTABLE = 5_000_000, 2_500_000
#: Pairs of the most loads of a report, and the rows of modules that each of its loads may then have.
_ROWS = ((20, 400), (60, 60), (120, 12))
_LEAST_ROWS = 3
_LISTS = (("improved", "Improved, not accepted"), ("stale", "Stale baselines"), ("notes", "Notes"))


def render(report: Report) -> str:
    """Return the report as HTML of fewer than :data:`MOST` bytes.

    A run of many loads has fewer details of each; if it is still too large, only the loads that failed are shown.
    """
    levels = [rows for most, rows in _ROWS if len(report.runs) <= most] + [_LEAST_ROWS]
    for rows in levels:
        text = _page(report, report.runs, rows)
        if len(text.encode()) < COMFORTABLE:
            return text
    if len(text.encode()) < MOST:
        return text
    failed = figures.failed(report.runs)
    text = _page(report, failed, _LEAST_ROWS)
    while len(text.encode()) >= MOST and failed:
        failed = failed[: len(failed) // 2]
        text = _page(report, failed, _LEAST_ROWS)
    return text


def _page(report: Report, shown: Sequence[Run], rows: int) -> str:
    # Loads that failed come first in every table and chart.
    numbered = list(enumerate(sorted(shown, key=lambda run: -SEVERITY.index(run.outcome)), 1))
    title = headline(report.runs)
    hidden = len(report.runs) - len(shown)
    head = el(
        "header",
        el("h1", title),
        el("p", _scope(report.runs), class_="scope"),
        el("p", *_counts(report.runs), class_="counts"),
        el("p", f"{counted(hidden, 'load is', 'loads are')} omitted to keep this file small; the JSON report has all.")
        if hidden
        else None,
    )
    made = [
        sections.attention(numbered),
        _filter(),
        sections.loads(numbered),
        sections.memory(numbered),
        sections.latency(numbered),
        sections.work(numbered),
        sections.environment(numbered),
        *_lists(report),
        details.details(numbered, rows),
    ]
    present = [section for section in made if section is not None]
    main = el("main", *present, id="main", tabindex="-1")
    return text_of(el("html", _head(title), el("body", _skip(), head, _contents(present), main, _script()), lang="en"))


def _scope(runs: Sequence[Run]) -> str:
    texts = (
        [run.spec.name for run in runs],
        [run.device_key for run in runs if run.device_key],
        [f"workload {run.spec.workload}" for run in runs],
    )
    return " · ".join(joined(list(dict.fromkeys(names)), 4) for names in texts if names)


def _counts(runs: Sequence[Run]) -> list[ET.Element]:
    counts = Counter(run.fate for run in runs)
    return [el("span", chip(verdict), f" {count} ", class_="count") for verdict, count in counts.most_common()]


def _head(title: str) -> ET.Element:
    # The browser itself refuses styles and scripts that are not this file's, even if escaping failed somewhere.
    policy = f"default-src 'none'; style-src '{_hash(_asset('style.css'))}'; script-src '{_hash(_asset('script.js'))}'"
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", **{"http-equiv": "Content-Security-Policy", "content": policy}),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", _asset("style.css")),
    )


def _asset(name: str) -> str:
    return files("pytest_llmload.reports.html").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _skip() -> ET.Element:
    return el("a", "Skip to the report", href="#main", class_="skip")


def _contents(present: Sequence[ET.Element]) -> ET.Element:
    links = [
        el("a", title.text or "", href=f"#{section.get('id')}")
        for section in present
        if section.get("id") and (title := section.find("h2")) is not None
    ]
    return el("nav", *links, aria_label="Contents")


def _filter() -> ET.Element:
    label = el("label", "Show loads whose name, device or verdict has ", el("input", id="text", type="search"))
    failing = el("label", el("input", id="failing", type="checkbox"), " only those that failed")
    # Useful only if scripts run; the script unhides the form.
    return el("form", label, failing, el("output", id="shown"), id="filter", hidden=True, role="search")


def _lists(report: Report) -> list[ET.Element]:
    slack = [
        f"{run.spec.id}: {item.name} {movement(item)} ({change(item)})" for run, item in figures.improved(report.runs)
    ]
    texts = {"improved": slack, "stale": report.stale, "notes": report.notes}
    return [
        el("section", el("h2", title), el("ul", *(el("li", text) for text in texts[name])), id=name)
        for name, title in _LISTS
        if texts[name]
    ]


def _script() -> ET.Element:
    return el("script", _asset("script.js"))
