"""``llmload``: what is done with baselines outside a test run."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_EXAMPLES = """\
examples:
  pytest --llm-model=org/model --llm-report=run.json     a full run, which finds out what is stale
  llmload prune run.json --dry-run                       what would be deleted
  llmload prune run.json                                 delete it, then commit
  llmload show baselines/org--model/cpu-x86_64/nf4.json  what one baseline holds

The exit status is 0, or 2 with one sentence on stderr.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 2 with one sentence on stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "prune":
            _prune(options.report, options.baselines, options.dry_run)
        else:
            _show(options.baseline)
        sys.stdout.flush()
    except _Refused as error:
        print(f"llmload: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as head, has seen enough. At its end Python would flush once more, and say so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Refused(Exception):
    """What the user has to change, in one sentence."""


class _Version(argparse.Action):
    """Looked up only when it is asked for: reading a distribution's metadata takes longer than a command."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llmload {version('pytest-llmload')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmload",
        description="Look at the baselines of pytest-llmload, and delete those that nothing uses any more.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prune = commands.add_parser(
        "prune",
        help="delete the baselines that a report calls stale",
        description="Delete the baselines that a report calls stale. Run it in the directory that pytest calls "
        "rootdir. Nothing is deleted where the report names anything but baselines below the baselines folder.",
    )
    prune.add_argument("report", metavar="REPORT", type=Path, help="of a full run: pytest … --llm-report=run.json")
    prune.add_argument(
        "--baselines",
        metavar="DIR",
        type=Path,
        default=Path("baselines"),
        help="the run's --llm-baselines (default: baselines)",
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    show = commands.add_parser(
        "show",
        help="print a baseline: how it was loaded, its figures, and what it was recorded on",
        description="Print a baseline: how it was loaded, its figures, and what it was recorded on.",
    )
    show.add_argument("baseline", metavar="FILE", type=Path, help="a file under baselines/")
    return parser


def _prune(report: Path, folder: Path, dry_run: bool) -> None:
    # All are looked at before any is deleted.
    stale = {_baseline(name, folder): name for name in _stale(report)}
    for path, name in stale.items():
        if not dry_run:
            try:
                path.unlink()
            except OSError as error:
                raise _Refused(f"cannot delete {name}: {error.strerror or error}") from None
        print(f"{'would delete' if dry_run else 'deleted'} {name}")
    if not stale:
        print("nothing is stale")


def _stale(report: Path) -> list[str]:
    """The files that a report names; it may have come from another machine, and is believed in nothing."""
    from pytest_llmload.reports.document import SCHEMA

    try:
        data = json.loads(report.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Refused(f"cannot read {report}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        data = None
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise _Refused(f"{report} has schema {schema}, and this pytest-llmload reads up to {SCHEMA}: upgrade it")
    stale = data.get("stale") if isinstance(data, dict) else None
    if type(schema) is not int or not isinstance(stale, list) or not all(isinstance(name, str) for name in stale):
        raise _Refused(f"{report} is no report of pytest --llm-report: make one with a full run")
    return stale


def _baseline(name: str, folder: Path) -> Path:
    """The file of a baseline below the folder. Raises _Refused for any other."""
    from pytest_llmload.baselines.store import SUFFIX, Store
    from pytest_llmload.core.errors import BaselineError

    try:
        root, path = folder.resolve(), Path(name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise _Refused(f"{name!r} is no path; nothing was deleted") from None
    # <model>/<device>/<variant>.json, with --llm-baseline-variant one level more.
    if not path.is_relative_to(root) or len(path.relative_to(root).parts) not in (3, 4) or path.suffix != SUFFIX:
        raise _Refused(
            f"{name!r} is no baseline below {folder}: run this in the directory that pytest calls rootdir, "
            "and give --baselines DIR where the run had --llm-baselines; nothing was deleted"
        )
    try:
        found = Store(root).read(path)
    except BaselineError as error:
        raise _Refused(f"{error}; nothing was deleted") from None
    if found is None:
        raise _Refused(f"there is no {name}: run this in the directory that pytest calls rootdir; nothing was deleted")
    return path


def _show(path: Path) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
