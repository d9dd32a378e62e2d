"""Make reports in other formats from a JSON report. The suffix of each file chooses its format."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llmload.cli.refused import CommandRefused, read_report
from pytest_llmload.reports.document import document
from pytest_llmload.reports.formats import known_suffixes, suffix_of, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("report", metavar="REPORT", type=Path, help="pytest … --llm-report=run.json")
    parser.add_argument("outputs", metavar="FILE", nargs="+", help=f"one of {known_suffixes()}")


def run(options: argparse.Namespace) -> int:
    """Write the reports; return 0."""
    report = read_report(options.report)
    write_all(options.outputs, document(report.runs, stale=report.stale, notes=report.notes))
    return 0


def write_all(outputs: list[str], made: dict[str, object]) -> None:
    """Write a report document to files. Raises CommandRefused, before anything is written, for an unknown suffix."""
    for output in outputs:
        try:
            suffix_of(output)
        except ValueError as error:
            raise CommandRefused(str(error)) from None
    for output in outputs:
        try:
            write(Path(output), made)
        except OSError as error:
            raise CommandRefused(f"cannot write {output}: {error.strerror or error}") from None
        print(f"wrote {output}")
