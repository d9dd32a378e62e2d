"""Join the reports of several jobs, such as one for each type of GPU, and print the matrix of verdicts.

A load in several reports becomes one load with the worst of its verdicts. A baseline is stale only if no report has a
load that uses it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llmload.cli.refused import columns, read_report
from pytest_llmload.cli.report import write_all
from pytest_llmload.core.runs import Run
from pytest_llmload.core.verdicts import ERROR, FAIL
from pytest_llmload.reports.document import document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("reports", metavar="REPORT", type=Path, nargs="+", help="JSON reports")
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        action="append",
        default=[],
        help="write the joined report; the suffix chooses the format; repeatable",
    )


def run(options: argparse.Namespace) -> int:
    """Join the reports; return 1 if a load in any of them failed, else 0."""
    merged: dict[tuple[str, str, str], Run] = {}
    stale: dict[str, None] = {}
    notes: dict[str, None] = {}
    for path in options.reports:
        report = read_report(path)
        for each in report.runs:
            key = (each.spec.name, each.spec.label, each.device_key)
            if key in merged:
                merged[key].merge(each)
            else:
                merged[key] = each
        stale |= dict.fromkeys(report.stale)
        notes |= dict.fromkeys(report.notes)
    runs = list(merged.values())
    used = {each.baseline for each in runs}
    write_all(options.output, document(runs, stale=[name for name in stale if name not in used], notes=list(notes)))
    print("\n".join(_matrix(runs)))
    return 1 if any(each.outcome in (FAIL, ERROR) for each in runs) else 0


def _matrix(runs: list[Run]) -> list[str]:
    """Return the lines of a table with a row for each load and a column for each device."""
    devices = list(dict.fromkeys(run.device_key or "no device" for run in runs))
    loads = dict.fromkeys((run.spec.name, run.spec.slug) for run in runs)
    verdicts = {(run.spec.name, run.spec.slug, run.device_key or "no device"): run.fate for run in runs}
    rows = [["load", *devices]]
    for name, slug in loads:
        row = [verdicts.get((name, slug, device), "-").replace("_", " ") for device in devices]
        rows.append([f"{name} / {slug}", *row])
    return columns(rows)
