"""Delete the baselines that a report calls stale. Run the command in the directory that pytest calls rootdir.

Nothing is deleted if the report names anything other than baselines below the baselines folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llmload.cli.refused import CommandRefused, add_baselines, read_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "report", metavar="REPORT", type=Path, help="the report of a full run: pytest … --llm-report=run.json"
    )
    add_baselines(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print what would be deleted")


def run(options: argparse.Namespace) -> int:
    """Delete the stale baselines, or print which would be deleted; return 0."""
    # Check every file before any is deleted.
    stale = {_baseline(name, options.baselines): name for name in read_report(options.report).stale}
    for path, name in stale.items():
        if not options.dry_run:
            try:
                path.unlink()
            except OSError as error:
                raise CommandRefused(f"cannot delete {name}: {error.strerror or error}") from None
        print(f"{'would delete' if options.dry_run else 'deleted'} {name}")
    if not stale:
        print("nothing is stale")
    return 0


def _baseline(name: str, folder: Path) -> Path:
    """Return the file of a baseline below the folder. Raises CommandRefused for any other."""
    from pytest_llmload.baselines.store import SUFFIX, Store
    from pytest_llmload.core.errors import BaselineError

    try:
        root, path = folder.resolve(), Path(name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise CommandRefused(f"{name!r} is not a path; nothing was deleted") from None
    # <model>/<device>/<variant>.json, with --llm-baseline-variant one level more.
    if not path.is_relative_to(root) or len(path.relative_to(root).parts) not in (3, 4) or path.suffix != SUFFIX:
        raise CommandRefused(
            f"{name!r} is not a baseline below {folder}: run this in the directory that pytest calls rootdir, "
            "and give --baselines DIR if the run had --llm-baselines; nothing was deleted"
        )
    try:
        found = Store(root).read(path)
    except BaselineError as error:
        raise CommandRefused(f"{error}; nothing was deleted") from None
    if found is None:
        raise CommandRefused(
            f"{name} does not exist: run this in the directory that pytest calls rootdir; nothing was deleted"
        )
    return path
