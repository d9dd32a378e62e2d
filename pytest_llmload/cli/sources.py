"""Read baselines from a folder, a git revision, or the loads of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_llmload.baselines.codec import loads
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import record
from pytest_llmload.baselines.store import SUFFIX
from pytest_llmload.cli import git
from pytest_llmload.cli.refused import CommandRefused, read_report
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.runs import Run
from pytest_llmload.reports.failure import ending


@dataclass(frozen=True, order=True)
class Place:
    """The place of a baseline, which identifies its load."""

    model: str
    device: str
    #: The folder of ``--llm-baseline-variant``; empty without one.
    level: str
    slug: str

    def __str__(self) -> str:
        return f"{self.model} / {self.slug} on {self.device}" + (f" ({self.level})" if self.level else "")


def place_of(path: str) -> Place | None:
    """Return the place of a file below a baselines folder; None for a file that is not a baseline."""
    parts = PurePosixPath(path).parts
    if len(parts) not in (3, 4) or not path.endswith(SUFFIX):
        return None
    level = parts[2] if len(parts) == 4 else ""
    return Place(parts[0], parts[1], level, parts[-1].removesuffix(SUFFIX))


def read(source: str, folder: Path) -> dict[Place, Baseline]:
    """Return the baselines of a report, of a folder, or of a git revision (those below ``folder``).

    Raises CommandRefused for any other source, and for a baseline that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        return _of_report(path)
    if path.is_dir():
        texts = {str(file.relative_to(path).as_posix()): file for file in sorted(path.rglob(f"*{SUFFIX}"))}
        return decoded({name: file.read_text(encoding="utf-8") for name, file in texts.items()}, source)
    return decoded(git.files_at(git.commit_of(source), folder), source)


def failed(source: str) -> dict[Place, str]:
    """Return the loads of a report that did not end in the requested model, each with the reason; else nothing."""
    path = Path(source)
    runs = read_report(path).runs if path.is_file() else []
    return {_place(run): ending(run.result) for run in runs if run.result is not None and not run.result.ok}


def decoded(texts: Mapping[str, str], source: str) -> dict[Place, Baseline]:
    """Return the baselines among some files. Raises CommandRefused for a baseline that cannot be read."""
    found = {}
    for path, text in texts.items():
        place = place_of(path)
        if place is None:
            continue
        try:
            found[place] = loads(text, f"{source}: {path}")
        except BaselineError as error:
            raise CommandRefused(str(error)) from None
    return found


def _of_report(path: Path) -> dict[Place, Baseline]:
    """Return the successful loads of a report, as they would be recorded."""
    found = {}
    for run in read_report(path).runs:
        if run.result is None or not run.result.ok or not run.result.digests:
            continue
        baseline = record(None, [run.result], update=True).baseline
        if baseline is not None:
            found[_place(run)] = baseline
    return found


def _place(run: Run) -> Place:
    return Place(run.spec.name, run.device_key, "", run.spec.slug)
