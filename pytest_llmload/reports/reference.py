"""The tables of the documentation, made from the data that the code itself reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pytest_llmload.core.metrics import METRICS
from pytest_llmload.core.verdicts import TABLE, Outcome, Row

_UNITS = {"B": "bytes", "s": "seconds", "1": "count"}
_LISTED = {
    "slack": "listed with its slack",
    "accepted": "listed as accepted",
    "recorded": "listed as recorded",
    "once": "said once",
    "stale": "listed as stale",
}


def metrics_table() -> str:
    """Every metric in Markdown: unit, class, tolerance, what it depends on, and what it is."""
    rows = [
        (
            f"`{metric.name}`",
            _UNITS[metric.unit],
            metric.kind.replace("_", " "),
            _gate(metric.section, metric.informative, metric.tolerance.format(metric.unit)),
            ", ".join(metric.depends) or "-",
            metric.description,
        )
        for metric in METRICS.values()
    ]
    return _table(("metric", "unit", "class", "may move by", "compared only with equal", "what it is"), rows)


def _gate(section: str, informative: bool, tolerance: str) -> str:
    if informative:
        return "never gates"
    return (
        f"{tolerance}, judged over processes" if section == "time" else "nothing" if tolerance == "exact" else tolerance
    )


def verdicts_table() -> str:
    """Every verdict in Markdown, and what it does to the test."""
    rows = [
        (_verdicts(row), *(_outcome(item) for item in (row.default, row.strict, row.update, row.record_missing)))
        for row in TABLE
    ]
    return _table(("verdict", "default", "`--llm-strict`", "`--llm-update-baselines`", "`--llm-record-missing`"), rows)


def _verdicts(row: Row) -> str:
    text = ", ".join(f"`{verdict}`" for verdict in row.verdicts)
    return f"{text} (one metric)" if row.metric_only else text


def _outcome(outcome: Outcome) -> str:
    parts = [outcome.status, *(["written"] if outcome.writes else []), *filter(None, [_LISTED.get(outcome.listed, "")])]
    return ", ".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # A bar inside a cell would start another one.
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
