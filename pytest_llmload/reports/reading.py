"""Read a JSON report. It may come from any machine or pull request, so none of its content is trusted."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llmload.core.decoding import Malformed, decode
from pytest_llmload.core.errors import ReportError
from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.results import LoadResult
from pytest_llmload.core.runs import Run
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.core.units import Tolerance
from pytest_llmload.core.verdicts import SEVERITY, Comparison, ManifestChange, MetricVerdict
from pytest_llmload.reports.document import SCHEMA

SECTIONS = ("memory", "work", "time")
#: Fields of a result that have the same name in the report.
_SAME = {item.name for item in dataclasses.fields(LoadResult)} - {"spec", "outcome"}
#: Entries of a metric's figures that may be null: JSON has no infinity.
_FINITE = ("metrics", "phases", "samples", "phase_peaks")


@dataclass
class Report:
    """A run as its JSON report describes it."""

    runs: list[Run] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Item:
    """A metric's verdict in a report."""

    verdict: str
    baseline: float | None
    current: float | None
    unit: str
    tolerance: dict[str, float]
    reason: str = ""
    informative: bool = False


@dataclass(frozen=True)
class _Section:
    """A comparison in a report."""

    verdict: str
    whole: bool
    reason: str
    metrics: dict[str, _Item]
    manifest: tuple[ManifestChange, ...] = ()
    because: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def read(path: Path) -> Report:
    """Return the report in a file. Raises ReportError with one sentence that says what to do."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        data = None
    return parse(data, str(path))


def parse(data: Any, source: str) -> Report:
    """Return the report in ``data``; ``source`` names it in messages. Raises ReportError."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise ReportError(
            f"{source} has schema {schema}, but this pytest-llmload reads schemas up to {SCHEMA}: "
            "upgrade pytest-llmload"
        )
    if type(schema) is not int:
        raise ReportError(f"{source} is not a report: make one with pytest --llm-report=run.json")
    try:
        return Report(
            [_run(item, f"run {index + 1}") for index, item in enumerate(decode(list[Any], data.get("runs"), "runs"))],
            decode(list[str], data.get("stale"), "stale"),
            decode(list[str], data.get("notes", []), "notes"),
        )
    except Malformed as wrong:
        raise ReportError(f"{source} is not a report ({wrong}): make one with pytest --llm-report=run.json") from None


def _run(data: Any, where: str) -> Run:
    item = decode(dict[str, Any], data, where)
    spec = _spec(item.get("spec"), where)
    outcome = decode(str, item.get("outcome"), f"{where}, outcome")
    if outcome not in SEVERITY:
        raise Malformed(f"{where} has the unknown outcome {outcome!r}")
    sections = decode(dict[str, _Section], item.get("verdicts", {}), f"{where}, verdicts")
    run = Run(
        spec,
        decode(str, item.get("device", ""), f"{where}, device"),
        _result(item, spec, where),
        [_comparison(name, section, where) for name, section in sections.items()],
        outcome=outcome,
    )
    for name, key in (
        ("nodeids", "tests"),
        *((name, name) for name in ("messages", "failures", "over_limits", "accepted", "recorded")),
    ):
        setattr(run, name, decode(list[str], item.get(key, []), f"{where}, {key}"))
    for name in ("baseline", "command"):
        setattr(run, name, decode(str, item.get(name, ""), f"{where}, {name}"))
    run.locations = decode(dict[str, str], item.get("locations", {}), f"{where}, locations")
    run.times = decode(dict[str, dict[str, Any]], item.get("times", {}), f"{where}, times")
    run.suite = decode(bool, item.get("suite", False), f"{where}, suite")
    return run


def _spec(data: Any, where: str) -> LoadSpec:
    try:
        return LoadSpec.from_json(decode(dict[str, Any], data, f"{where}, spec"))
    except Malformed:
        raise
    except (KeyError, TypeError, ValueError) as wrong:
        raise Malformed(f"{where} has a spec that this release does not know: {wrong}") from None


def _result(item: dict[str, Any], spec: LoadSpec, where: str) -> LoadResult | None:
    outcome = decode(str, item.get("load", ""), f"{where}, load")
    if not outcome:
        return None
    values = {name: item[name] for name in _SAME - {"declared"} if item.get(name) is not None}
    for name in _FINITE:
        values[name] = _without_null(values.get(name, {}))
    result = decode(LoadResult, {**values, "spec": spec.to_json(), "outcome": outcome}, where)
    declared = decode(dict[str, dict[str, Any]], item.get("declared", {}), f"{where}, declared")
    result.declared = tuple(_declared(row, f"{where}, declared, {name}") for name, row in declared.items())
    return result


def _declared(row: dict[str, Any], where: str) -> Metric:
    tolerance = _tolerance(decode(dict[str, float], row.get("tolerance", {}), f"{where}, tolerance"))
    known = {item.name: row[item.name] for item in dataclasses.fields(Metric) if item.name in row}
    try:
        return Metric(**{**known, "depends": tuple(known.get("depends", ())), "tolerance": tolerance})
    except (AttributeError, TypeError, ValueError) as wrong:
        raise Malformed(f"{where} does not declare a metric: {wrong}") from None


def _tolerance(given: dict[str, float]) -> Tolerance:
    return Tolerance(given.get("relative", 0.0), given.get("absolute", 0.0))


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [item for item in value if item is not None] if isinstance(value, list) else value


def _comparison(name: str, section: _Section, where: str) -> Comparison:
    if name not in SECTIONS:
        raise Malformed(f"{where} has the unknown section {name!r}")
    metrics = tuple(
        MetricVerdict(
            metric,
            item.verdict,
            item.baseline,
            item.current,
            item.unit,
            _tolerance(item.tolerance),
            item.reason,
            item.informative,
        )
        for metric, item in section.metrics.items()
    )
    return Comparison(
        name,
        section.verdict,
        section.whole,
        section.reason,
        metrics,
        section.manifest,
        section.because,
        section.changed,
    )
