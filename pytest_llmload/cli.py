"""``llmload``: what is done with baselines outside a test run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="llmload", description="Baselines of pytest-llmload, outside a test run.")
    commands = parser.add_subparsers(dest="command", required=True)
    prune = commands.add_parser("prune", help="delete the baselines that a report calls stale")
    prune.add_argument("report", type=Path, help="report of a full run: pytest … --llm-report=run.json")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    show = commands.add_parser("show", help="print a baseline: what it was recorded on, and its figures")
    show.add_argument("baseline", type=Path, help="a file under baselines/")
    options = parser.parse_args(arguments)
    try:
        return _prune(options.report, options.dry_run) if options.command == "prune" else _show(options.baseline)
    except _Refused as error:
        print(f"llmload: {error}", file=sys.stderr)
        return 2


class _Refused(Exception):
    """What the user has to change, in one sentence."""


def _prune(report: Path, dry_run: bool) -> int:
    try:
        stale = json.loads(report.read_text())["stale"]
    except OSError as error:
        raise _Refused(f"cannot read {report}: {error.strerror}") from None
    except (ValueError, KeyError):
        raise _Refused(f"{report} is no report of pytest --llm-report") from None
    for name in stale:
        path = Path(name)
        if not path.is_file():
            raise _Refused(f"{name} is not here: run this in the directory that pytest calls rootdir")
    for name in stale:
        if not dry_run:
            Path(name).unlink()
        print(f"{'would delete' if dry_run else 'deleted'} {name}")
    if not stale:
        print("nothing is stale")
    return 0


def _show(path: Path) -> int:
    from pytest_llmload.baselines.store import Store
    from pytest_llmload.core.errors import BaselineError
    from pytest_llmload.core.metrics import find
    from pytest_llmload.core.units import format_seconds, format_value

    try:
        baseline = Store(path.parent).read(path)
    except BaselineError as error:
        raise _Refused(str(error)) from None
    if baseline is None:
        raise _Refused(f"there is no {path}")
    rows = [("spec", json.dumps(baseline.spec)), ("workload", baseline.workload)]
    for name, value in {**baseline.memory, **baseline.work}.items():
        metric = find(name)
        rows.append((name, format_value(value, metric.unit if metric else "1")))
    for host, timings in baseline.time.items():
        rows += [(f"{name} on {host}", format_seconds(timing.median)) for name, timing in timings.items()]
    rows += sorted(baseline.environment.items())
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
