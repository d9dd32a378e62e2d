"""Write the sections about all loads: what needs attention, the table, and the charts that compare loads."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence

from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import format_bytes, format_seconds
from pytest_llmload.core.verdicts import CHANGED, MISSING, UNAVAILABLE, MetricVerdict
from pytest_llmload.reports import figures
from pytest_llmload.reports.html.charts import Part, stacked, strip
from pytest_llmload.reports.html.elements import NONE, cells, chip, el, figure, group, legend, row, table, tone
from pytest_llmload.reports.layout import allowance, change, movement
from pytest_llmload.reports.terminal import tokens_per_second

Numbered = Sequence[tuple[int, Run]]
_COLUMNS = (
    ("weights", ("gpu.weights", "host.weights"), format_bytes),
    ("settled", ("gpu.settled", "host.settled"), format_bytes),
    ("load peak", ("gpu.load_peak", "host.peak"), format_bytes),
    ("load", ("load",), format_seconds),
    ("first token", ("ttft",), format_seconds),
)
_PHASE_NAMES = {"load": "loading", "forward": "first forward", "generate": "generating"}


def link(number: int, run: Run) -> ET.Element:
    """Return the load's name as a link to its details."""
    return el("a", run.spec.id, href=f"#load-{number}")


def marks(number: int) -> dict[str, object]:
    """Return the attribute by which the filter finds the elements of a load."""
    return {"data_load": number}


def attention(runs: Numbered) -> ET.Element:
    """Return one card for each load that failed: what changed, why, and how to accept it."""
    numbers = {id(run): number for number, run in runs}
    cards = [_card(numbers[id(run)], run) for run in figures.failed(run for _, run in runs)]
    if not cards:
        return el("section", el("h2", "What changed"), el("p", "Nothing failed."), id="moved")
    return el("section", el("h2", "What changed"), *cards, id="moved")


def _card(number: int, run: Run) -> ET.Element:
    head = el("h3", chip(run.fate), " ", link(number, run), el("small", f" on {run.device_key or 'no device'}"))
    parts: list[ET.Element] = []
    failing = figures.failing_parts(run)
    # If nothing could be compared, each section says the same about the file.
    for comparison in failing[:1] if all(part.whole for part in failing) else failing:
        moved = [item for item in comparison.metrics if item.change is not None and item.verdict != "ok"]
        if moved:
            rows = [
                row(
                    item.name,
                    figure(movement(item).replace(" -> ", " → ")),
                    figure(change(item)),
                    allowance(item),
                    chip(item.verdict),
                )
                for item in moved
            ]
            head_ = ("figure", "baseline → now", "change", "allowed", "")
            parts.append(table("Figures that changed", head_, rows, class_="moved"))
        parts += _texts("also", [f"{item.name}: {item.reason}" for item in comparison.metrics if _is_aside(item)])
        reasons = [comparison.reason] if comparison.whole else []
        parts += _texts("because", [*reasons, *(comparison.because or (item.text for item in comparison.manifest))])
        parts += _texts("changed in its environment", comparison.changed)
    message = el("pre", figures.cause(run), tabindex="0")
    whole = el("details", el("summary", "The test's message"), message) if parts else None
    parts = parts or [message]
    accept = None
    if run.command and run.result is not None and run.result.ok and failing:
        accept = el(
            "p",
            "Accept it on any machine, with this run's JSON report: ",
            el("code", "llmload accept run.json"),
            " or measure it again: ",
            el("code", run.command),
        )
    return el("article", head, *parts, accept, whole, class_=f"card {tone(run.fate)}", **marks(number))


def _is_aside(item: MetricVerdict) -> bool:
    """Return whether a metric fails without a difference in its unit; the manifest's differences are the reasons."""
    return item.verdict in (CHANGED, MISSING, UNAVAILABLE) and item.name != "manifest" and bool(item.reason)


def _texts(title: str, texts: Sequence[str]) -> list[ET.Element]:
    return [el("h4", title), el("ul", *(el("li", text) for text in texts))] if texts else []


def loads(runs: Numbered) -> ET.Element:
    """Return the table of all loads."""
    rows = []
    for number, run in runs:
        sizes = [figure(_first(run, names, form)) for _, names, form in _COLUMNS]
        speed = tokens_per_second(run)
        sizes.append(figure(NONE if speed is None else f"{speed:.1f}"))
        rows.append(row(link(number, run), el("td", chip(run.fate)), run.device_key, *sizes, **marks(number)))
    titles = [title for title, *_ in _COLUMNS]
    return el(
        "section",
        el("h2", "Loads"),
        table("Every load of the run", ("load", "verdict", "device", *titles, "tokens/s"), rows, class_="loads"),
        id="loads",
    )


def _first(run: Run, names: Sequence[str], form: Callable[[float], str]) -> str:
    metrics = run.result.metrics if run.result else {}
    value = next((metrics[name] for name in names if metrics.get(name) is not None), None)
    return NONE if value is None else form(value)


def memory(runs: Numbered) -> ET.Element | None:
    """Return stacked bars: the memory of each load by phase, on one scale for each side."""
    sides = {number: figures.memory(run) for number, run in runs}
    tables = []
    for side, title in (("gpu", "GPU memory"), ("host", "Host memory: growth over the state before the load")):
        having = [(number, run, sides[number][side]) for number, run in runs if side in sides[number]]
        if not having:
            continue
        most = max(max(phase.peak, phase.baseline or 0) for *_, phases in having for phase in phases)
        rows = []
        for number, run, phases in having:
            own = []
            for phase in phases:
                parts = [
                    Part("weights", "weights", phase.weights),
                    Part("settled", "held in addition to the weights", phase.settled),
                    Part("transient", "held temporarily", phase.transient),
                ]
                moved = NONE
                if phase.baseline:
                    moved = f"{100 * (phase.peak / phase.baseline - 1):+.1f} %"
                own.append(
                    cells(
                        _PHASE_NAMES.get(phase.phase, phase.phase),
                        el("td", stacked(parts, most, format_bytes, baseline=phase.baseline), class_="wide"),
                        figure(format_bytes(phase.peak)),
                        figure(NONE if phase.baseline is None else format_bytes(phase.baseline)),
                        figure(moved),
                    )
                )
            rows.append(group(link(number, run), own, **marks(number)))
        head = ("load", "phase", "memory", "peak", "baseline", "change")
        tables.append(table(title, head, rows, class_="bars"))
    if not tables:
        return None
    keys = legend(
        ("weights", "weights"),
        ("settled", "held in addition to the weights"),
        ("transient", "held temporarily"),
        ("ticked", "baseline"),
    )
    return el("section", el("h2", "Memory by load and phase"), keys, *tables, id="memory")


def latency(runs: Numbered) -> ET.Element | None:
    """Return the samples of each time as dots, with their median and the baseline's."""
    titles = {"load": "Time of the load", "ttft": "Time to first token", "per_token": "Time per further token"}
    found = {number: figures.distributions(run) for number, run in runs}
    tables = []
    for name, title in titles.items():
        having = [(number, run, found[number][name]) for number, run in runs if name in found[number]]
        rows = []
        bounds = [value for *_, samples in having for value in samples]
        bounds += [value for _, run, _ in having if (value := figures.recorded(run, name)) is not None]
        low, high = (min(bounds), max(bounds)) if bounds else (0.0, 1.0)
        room = 0.04 * (high - low) or 0.04 * high
        for number, run, samples in having:
            verdict, baseline = figures.verdict_of(run, name), figures.recorded(run, name)
            rows.append(
                row(
                    link(number, run),
                    el("td", strip(samples, low - room, high + room, baseline=baseline), class_="wide"),
                    figure(format_seconds(statistics.median(samples))),
                    figure(NONE if baseline is None else format_seconds(baseline)),
                    figure(str(len(samples))),
                    el("td", chip(verdict.verdict) if verdict else NONE),
                    **marks(number),
                )
            )
        if rows:
            tables.append(table(title, ("load", "samples", "median", "baseline", "n", "verdict"), rows, class_="bars"))
    if not tables:
        return None
    keys = legend(("dotted", "sample"), ("medianed", "median"), ("ticked", "baseline"))
    return el("section", el("h2", "Latency"), keys, *tables, id="latency")


def work(runs: Numbered) -> ET.Element | None:
    """Return the counts of work compared with the baseline."""
    rows = []
    for number, run in runs:
        own = [
            cells(
                item.name,
                figure(movement(item) if item.baseline is not None else movement(item).partition(" -> ")[2]),
                figure(change(item) or NONE),
                el("td", chip(item.verdict)),
            )
            for item in figures.work(run)
        ]
        if own:
            rows.append(group(link(number, run), own, **marks(number)))
    if not rows:
        return None
    return el(
        "section",
        el("h2", "Work"),
        table("Counts per prefill and per token", ("load", "count", "baseline → now", "change", "verdict"), rows),
        id="work",
    )


def environment(runs: Numbered) -> ET.Element:
    """Return the loads' environments, with differences from the baselines' first."""
    everything = [run for _, run in runs]
    differing = figures.changed(everything)
    common, own = figures.environments(everything)
    parts: list[ET.Element] = []
    if differing:
        rows = [row(text, figure(str(count))) for text, count in differing.items()]
        parts.append(table("Differs from the baselines", ("what", "loads"), rows, class_="changed"))
    else:
        parts.append(el("p", "The environment is that of the compared baselines."))
    if common:
        rows = [row(name, value) for name, value in sorted(common.items())]
        parts.append(table("The same for all loads", ("entry", "value"), rows))
    if own:
        numbers = {run.spec.id: (number, run) for number, run in runs}
        rows = [
            row(link(*numbers[load]), name, value, **marks(numbers[load][0]))
            for load, entries in own.items()
            for name, value in sorted(entries.items())
        ]
        parts.append(table("Different between loads", ("load", "entry", "value"), rows))
    return el("section", el("h2", "Environment"), *parts, id="environment")
