"""Show the details of one load: memory over time, the driver's ledger, its modules, everything measured."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from pytest_llmload.core.metrics import find
from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import format_bytes, format_seconds, format_value
from pytest_llmload.core.verdicts import ERROR, FAIL
from pytest_llmload.reports import allocations, figures
from pytest_llmload.reports.html.charts import Part, lines, stacked
from pytest_llmload.reports.html.elements import NONE, chip, el, figure, legend, row, table
from pytest_llmload.reports.html.sections import Numbered, marks

#: With fewer rows than this, the figures of passed loads are only in the JSON report.
_FEW = 60
#: Parts that the driver's figure of a GPU consists of.
_LEDGER = (
    ("weights", "weights"),
    ("rest", "settled"),
    ("reserved", "transient"),
    ("context", "context"),
    ("other", "other"),
)


def details(runs: Numbered, rows: int) -> ET.Element:
    """Return every load, folded, with at most ``rows`` rows of its modules."""
    return el("section", el("h2", "Load by load"), *(_load(number, run, rows) for number, run in runs), id="details")


def _load(number: int, run: Run, rows: int) -> ET.Element:
    head = el("summary", el("strong", run.spec.id), " ", chip(run.fate), el("small", f" {run.device_key}"))
    parts: list[ET.Element] = [_identity(run)]
    if run.messages:
        parts += [el("h4", "Messages"), el("ul", *(el("li", text) for text in run.messages))]
    if run.result is not None:
        result = run.result
        series = {place: points for place, points in result.timeline.items() if len(points) > 1}
        if series:
            parts += [el("h4", "Memory while loading"), lines(series)]
        parts += _phases(run) + _ledger(run) + _allocations(run) + _modules(run, rows)
        parts += _metrics(run) if rows >= _FEW or run.outcome in (FAIL, ERROR) else []
        if result.notes:
            parts += [el("h4", "Notes"), el("ul", *(el("li", text) for text in result.notes))]
        if not result.ok:
            parts += [el("h4", "How it ended"), el("pre", figures.cause(run), tabindex="0")]
    return el("details", head, *parts, class_="load", id=f"load-{number}", data_text=_searched(run), **marks(number))


def _allocations(run: Run) -> list[ET.Element]:
    """Return who allocated, of a load that was repeated to record that; the largest growth first."""
    assert run.result is not None
    found = sorted(run.result.allocations, key=lambda each: (each.baseline or 0) - each.bytes)
    rows = [
        row(
            each.site,
            f"{allocations.moment(each)}{f', held by {each.held_by}' if each.held_by else ''}",
            each.place,
            figure(format_bytes(each.bytes)),
            figure(NONE if each.baseline is None else format_bytes(each.baseline)),
        )
        for each in found
    ]
    return [table("Who allocated it", ("line", "held", "where", "now", "baseline"), rows)] if rows else []


def _searched(run: Run) -> str:
    """Return the text that the filter searches."""
    return " ".join((run.spec.id, run.device_key, run.fate.replace("_", " "))).lower()


def _identity(run: Run) -> ET.Element:
    entries = [
        ("model", run.spec.model),
        ("variant", run.spec.slug),
        ("workload", str(run.spec.workload)),
        ("device", run.device_key),
        ("baseline", run.baseline or "not compared"),
        ("tests", ", ".join(run.nodeids) or "none"),
    ]
    entries += [(word, ", ".join(names)) for word in ("accepted", "recorded") if (names := getattr(run, word))]
    return el("dl", *(part for name, value in entries for part in (el("dt", name), el("dd", value))))


def _phases(run: Run) -> list[ET.Element]:
    assert run.result is not None
    phases = run.result.phases
    parts = [
        (name, phases[name]) for name in ("load.read", "load.convert", "load.move", "load.other") if name in phases
    ]
    rows = [row(name, figure(format_seconds(seconds))) for name, seconds in phases.items()]
    if not rows:
        return []
    found = [el("h4", "Where the time went")]
    if parts:
        kinds = ("weights", "settled", "transient", "other")
        pieces = [Part(kind, name, seconds) for kind, (name, seconds) in zip(kinds, parts, strict=False)]
        found.append(stacked(pieces, sum(seconds for _, seconds in parts), format_seconds))
        found.append(legend(*((piece.kind, piece.label) for piece in pieces)))
    return [*found, table("Seconds by phase", ("phase", "time"), rows)]


def _ledger(run: Run) -> list[ET.Element]:
    assert run.result is not None
    if not run.result.ledger:
        return []
    most = max(max(entry.values(), default=0.0) for entry in run.result.ledger)
    rows = []
    for number, entry in enumerate(run.result.ledger):
        parts = [Part(kind, name, entry.get(name, 0.0)) for name, kind in _LEDGER]
        words = ", ".join(f"{name} {format_bytes(value)}" for name, value in entry.items())
        rows.append(row(f"GPU {number}", el("td", stacked(parts, most, format_bytes), class_="wide"), words))
    names = legend(*((kind, name) for name, kind in _LEDGER))
    return [
        el("h4", "Parts of the driver's figure"),
        names,
        table("Ledger", ("GPU", "", "parts"), rows, class_="bars"),
    ]


def _modules(run: Run, most: int) -> list[ET.Element]:
    assert run.result is not None
    kinds, whole = figures.kinds(run), run.result.manifest
    if not kinds:
        return []
    top = kinds[0].bytes or 1
    rows = [
        row(
            kind.cls,
            kind.dtype or NONE,
            kind.device,
            kind.quant or "dense",
            figure(f"{kind.count:,}"),
            el("td", stacked([Part("weights", kind.cls, kind.bytes)], top, format_bytes), class_="wide"),
            figure(format_bytes(kind.bytes)),
        )
        for kind in kinds[:most]
    ]
    head = ("class", "dtype", "device", "quantisation", "modules", "", "bytes")
    found = [el("h4", "Modules by kind"), table("Modules by kind", head, rows, class_="bars")]
    ordered = sorted(whole, key=lambda item: -item.bytes)[:most]
    lines_ = [
        row(
            item.module or "(the model itself)",
            item.indices,
            item.cls,
            item.dtype,
            item.device,
            item.quant,
            figure(f"{item.count:,}"),
            figure(format_bytes(item.bytes)),
        )
        for item in ordered
    ]
    rest = len(whole) - len(ordered)
    title = f"Modules, the largest first ({len(ordered)} of {len(whole)} rows)" if rest else "Modules"
    names = ("module", "numbers", "class", "dtype", "device", "quantisation", "modules", "bytes")
    if len(whole) > len(kinds[:most]):
        found.append(el("details", el("summary", title), table(title, names, lines_)))
    return found


def _metrics(run: Run) -> list[ET.Element]:
    assert run.result is not None
    rows = []
    for name, value in sorted(run.result.metrics.items()):
        metric = find(name, run.result.table)
        judged = figures.verdict_of(run, name)
        unit = metric.unit if metric else "1"
        baseline = judged.baseline if judged else None
        rows.append(
            row(
                name,
                figure(format_value(value, unit)),
                figure(NONE if baseline is None else format_value(baseline, unit)),
                el("td", chip(judged.verdict) if judged else NONE),
                judged.reason if judged else "",
            )
        )
    rows += [row(name, NONE, NONE, "unavailable", why) for name, why in sorted(run.result.unavailable.items())]
    if not rows:
        return []
    whole = table("Everything measured", ("figure", "now", "baseline", "verdict", "why"), rows)
    return [el("details", el("summary", f"Everything measured ({len(rows)})"), whole)]
