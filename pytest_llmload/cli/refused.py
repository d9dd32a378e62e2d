"""The error of a command that refuses its input, and the arguments and texts that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_llmload.reports.reading import Report


class CommandRefused(Exception):
    """A command cannot do what it should; the message says in one sentence what the user must change."""


def add_baselines(parser: argparse.ArgumentParser) -> None:
    """Add ``--baselines DIR``."""
    parser.add_argument(
        "--baselines",
        metavar="DIR",
        type=Path,
        default=Path("baselines"),
        help="the run's --llm-baselines (default: baselines)",
    )


def read_report(path: Path) -> Report:
    """Return the report in a file. Raises CommandRefused."""
    from pytest_llmload.core.errors import ReportError
    from pytest_llmload.reports.reading import read

    try:
        return read(path)
    except ReportError as error:
        raise CommandRefused(str(error)) from None


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of texts as aligned lines; the last column is not padded."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
