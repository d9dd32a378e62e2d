"""Move the baselines of a model to its new name. The files keep their bytes; commit the result.

Nothing is moved if the new name already has one of these baselines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

from pytest_llmload.baselines.store import SUFFIX, component
from pytest_llmload.cli.refused import CommandRefused, add_baselines
from pytest_llmload.core.units import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("old", metavar="OLD", help="the model's old name: its folder below the baselines")
    parser.add_argument("new", metavar="NEW", help="the name that it has in --llm-model=NAME=SPEC from now on")
    add_baselines(parser)


def run(options: argparse.Namespace) -> int:
    """Move every file, or none; return 0. Raises CommandRefused if one of them cannot be moved."""
    try:
        old, new = (options.baselines / component(name, "model name") for name in (options.old, options.new))
    except ValueError as error:
        raise CommandRefused(str(error)) from None
    if not old.is_dir():
        raise CommandRefused(f"{old} does not exist: run this in the directory that pytest calls rootdir")
    files = sorted(path.relative_to(old) for path in old.rglob(f"*{SUFFIX}"))
    if not files:
        raise CommandRefused(f"{old} does not hold a baseline: give the model's folder below the baselines")
    if taken := [str(new / file) for file in files if (new / file).exists()]:
        raise CommandRefused(
            f"{taken[0]} exists already ({len(taken)} of {counted(len(files), 'file')}): nothing was moved"
        )
    moved = []
    try:
        for file in files:
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            (old / file).rename(new / file)
            moved.append(file)
    except OSError as error:
        for file in moved:
            (new / file).rename(old / file)
        raise CommandRefused(f"cannot move {old / file}: {error.strerror or error}; nothing was moved") from None
    for folder, _, _ in os.walk(old, topdown=False):
        # A folder that holds other files stays.
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    print("\n".join(f"{old / file} -> {new / file}" for file in files))
    return 0
