"""Write the baselines that a report measured, on any machine: without GPU, torch or model.

For each load whose tests compare a baseline, the figures that they compared are written, as --llm-update-baselines
would write them. Nothing is written for a load that failed, for a load whose baseline has a different shape, spec or
workload (--replace records it again), or from a report of a newer release. Run the command in the directory that pytest
calls rootdir.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pytest_llmload.baselines.codec import read_timing
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import Recording, record
from pytest_llmload.baselines.store import Store
from pytest_llmload.cli.refused import CommandRefused, add_baselines, columns, read_report
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.verdicts import INCOMPARABLE, MISSING, Run
from pytest_llmload.reports.layout import change, movement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("report", metavar="REPORT", type=Path, help="pytest … --llm-report=run.json")
    add_baselines(parser)
    parser.add_argument(
        "--load", metavar="ID", action="append", default=[], help="only this load, as tests name it; repeatable"
    )
    parser.add_argument(
        "--replace", action="store_true", help="also replace baselines of a different shape, spec or workload"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print what would be written")


@dataclass
class _Decision:
    """The decision about one load's baseline."""

    run: Run
    path: Path
    #: The reason why nothing may be written.
    refusal: str = ""
    recordings: list[Recording] = field(default_factory=list)


def run(options: argparse.Namespace) -> int:
    """Write the baselines that may be written; return 1 if a load was refused, else 0."""
    report = read_report(options.report)
    chosen = [each for each in report.runs if not options.load or each.spec.id in options.load]
    if unknown := set(options.load) - {each.spec.id for each in report.runs}:
        known = ", ".join(each.spec.id for each in report.runs) or "none"
        raise CommandRefused(f"{options.report} does not have the load {min(unknown)!r}; it has {known}")
    # Decide about every load before the first file is touched.
    decisions = [_decide(each, options) for each in chosen if each.comparisons or each.result is None or _failed(each)]
    rows = []
    for decision in decisions:
        if not decision.refusal and not options.dry_run:
            _write(decision, options)
        rows += _rows(decision, options.dry_run)
    if not rows:
        print(f"{options.report} does not have a load whose tests compare a baseline: nothing to accept")
        return 0
    print("\n".join(columns([("load", "entry", "baseline -> now", "", "file"), *rows])))
    return 1 if any(decision.refusal for decision in decisions) else 0


def _failed(run: Run) -> bool:
    return run.result is not None and not run.result.ok


def _decide(run: Run, options: argparse.Namespace) -> _Decision:
    """Return what would be written. Raises CommandRefused for a report whose names lead out of the folder."""
    try:
        store = Store(options.baselines, _variant_level(run))
        path = store.path_for(run.spec.name, run.device_key, run.spec.slug)
    except ValueError as error:
        raise CommandRefused(f"{options.report}: {error}; nothing was written") from None
    decision = _Decision(run, path)
    if run.result is None:
        decision.refusal = f"nothing was loaded ({run.messages[0] if run.messages else run.verdict})"
    elif not run.result.ok:
        decision.refusal = f"the load failed: {run.result.outcome.replace('_', ' ')}"
    elif missing := {"shape", "weights"} - run.result.digests.keys():
        decision.refusal = f"the report does not identify the model: it lacks a digest of its {min(missing)}"
    else:
        try:
            decision.recordings.append(_recording(run, store.read(path)))
        except (BaselineError, ValueError) as error:
            decision.refusal = str(error)
            return decision
        decision.refusal = "; ".join(decision.recordings[-1].refusals) or _other_model(run, store.read(path), options)
    return decision


def _variant_level(run: Run) -> str | None:
    """Return the folder of ``--llm-baseline-variant`` below the device's, from the report's path of the baseline."""
    folders = PurePosixPath(run.baseline).parts[:-1]
    return folders[-1] if len(folders) > 1 and folders[-1] != run.device_key and folders[-2] == run.device_key else None


def _other_model(run: Run, baseline: Baseline | None, options: argparse.Namespace) -> str:
    """Return why an existing baseline does not belong to this load; empty if it does, or is to be replaced."""
    from pytest_llmload.baselines.compare import other_identity

    assert run.result is not None
    reason = other_identity(baseline, run.result) if baseline is not None and not options.replace else ""
    return f"{reason}: --replace records it again" if reason else ""


def _recording(run: Run, existing: Baseline | None) -> Recording:
    """Return the baseline with what the load's tests compared. Raises BaselineError for invalid times."""
    assert run.result is not None
    sections = [comparison.section for comparison in run.comparisons]
    items = [item for comparison in run.comparisons for item in comparison.metrics]
    whole = any(comparison.whole for comparison in run.comparisons)
    return record(
        existing,
        [run.result],
        update=True,
        sections=sections,
        metrics=None if whole else [item.name for item in items],
        tolerances={item.name: item.tolerance for item in items if not whole and item.name != "manifest"},
        times={name: read_timing(entry, f"the report's {name}") for name, entry in run.times.items()} or None,
        suite=run.suite,
    )


def _write(decision: _Decision, options: argparse.Namespace) -> None:
    """Write one file under its lock, based on the content that it has by then."""

    def change_(existing: Baseline | None) -> Baseline | None:
        decision.recordings.append(_recording(decision.run, existing))
        return decision.recordings[-1].baseline

    try:
        Store(options.baselines).update(decision.path, change_)
    except BaselineError as error:
        raise CommandRefused(str(error)) from None


def _rows(decision: _Decision, is_dry: bool) -> list[tuple[str, str, str, str, str]]:
    load, path = decision.run.spec.id, str(decision.path)
    if decision.refusal:
        return [(load, "refused", decision.refusal, "", path)]
    recording = decision.recordings[-1]
    items = {item.name: item for comparison in decision.run.comparisons for item in comparison.metrics}
    rows = []
    words = {"accepted": "would be accepted" if is_dry else "accepted", "new": "would be new" if is_dry else "new"}
    for name in (*recording.accepted, *recording.recorded):
        item = items.get(name)
        word = words["accepted" if name in recording.accepted else "new"]
        has_figures = item is not None and item.verdict not in (MISSING, INCOMPARABLE) and item.change is not None
        moved = f"{movement(item)} ({change(item)})" if item is not None and has_figures else ""
        rows.append((load, name, moved or "-", word, path))
    for text in recording.dropped:
        name, _, why = text.partition(": ")
        rows.append((load, name, why, "dropped", path))
    return rows or [(load, "-", "as recorded", "unchanged", path)]
