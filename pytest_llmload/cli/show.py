"""Print a baseline: how the model was loaded, its figures, and the environment of the recording."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pytest_llmload.baselines.store import Store
from pytest_llmload.cli.refused import CommandRefused, columns
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.metrics import find
from pytest_llmload.core.units import format_seconds, format_value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("baseline", metavar="FILE", type=Path, help="a file under baselines/")


def run(options: argparse.Namespace) -> int:
    """Print the baseline; return 0. Raises CommandRefused if the file does not exist."""
    path: Path = options.baseline
    try:
        baseline = Store(path.parent).read(path)
    except BaselineError as error:
        raise CommandRefused(str(error)) from None
    if baseline is None:
        raise CommandRefused(f"{path} does not exist: give a baseline file")
    rows = [("spec", json.dumps(baseline.spec)), ("workload", baseline.workload)]
    for name, value in {**baseline.memory, **baseline.work}.items():
        metric = find(name)
        rows.append((name, format_value(value, metric.unit if metric else "1")))
    for host, timings in baseline.time.items():
        rows += [(f"{name} on {host}", format_seconds(timing.median)) for name, timing in timings.items()]
    rows += sorted(baseline.environment.items())
    print("\n".join(columns(rows)))
    return 0
