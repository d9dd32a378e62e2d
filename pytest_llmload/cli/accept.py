"""Write the baselines that a report measured, on any machine: without GPU, torch or model.

For each load whose tests compare a baseline, the figures that they compared are written, as --llm-update-baselines
would write them. Nothing is written for a load that failed, for a load whose baseline has a different shape, spec or
workload (--replace records it again), or from a report of a newer release. Run the command in the directory that pytest
calls rootdir.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pytest_llmload.baselines.codec import read_timing
from pytest_llmload.baselines.model import Baseline
from pytest_llmload.baselines.record import Recording, record
from pytest_llmload.baselines.store import Store
from pytest_llmload.cli.refused import CommandRefused, add_baselines, read_report
from pytest_llmload.core.errors import BaselineError
from pytest_llmload.core.metrics import find
from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import format_value
from pytest_llmload.core.verdicts import ACCEPTED, INCOMPARABLE, MISSING, MetricVerdict
from pytest_llmload.reports.failure import ending
from pytest_llmload.reports.layout import change, joined, labelled, movement

#: Figures of a new baseline that are shown; the file has all.
_NAMES = 4


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
    if not decisions:
        print(f"{options.report} does not have a load whose tests compare a baseline: nothing to accept")
        return 0
    for decision in decisions:
        if not decision.refusal and not options.dry_run:
            _write(decision, options)
    # A refusal stands where it is seen: above the last line.
    shown = sorted(decisions, key=lambda decision: bool(decision.refusal))
    print("\n".join([*(line for decision in shown for line in _lines(decision)), _total(decisions, options)]))
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
        decision.refusal = ending(run.result)
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


def _lines(decision: _Decision) -> list[str]:
    """Return what is written of one load, or why nothing is; nothing for a baseline that stays as it is."""
    if decision.refusal:
        return [f"{decision.run.spec.id}: refused, {decision.refusal}"]
    recording = decision.recordings[-1]
    items = {item.name: item for comparison in decision.run.comparisons for item in comparison.metrics}
    width = max(map(len, recording.accepted), default=0)
    rows = [(ACCEPTED, f"{name:<{width}}  {_moved(items.get(name))}".rstrip()) for name in recording.accepted]
    if recording.recorded:
        rows.append(("new", joined(_measured(recording.recorded, decision.run), _NAMES)))
    rows += [("dropped", text) for text in recording.dropped]
    return [str(decision.path), *labelled(rows)] if rows else []


def _moved(item: MetricVerdict | None) -> str:
    if item is None or item.verdict in (MISSING, INCOMPARABLE):
        return ""
    return item.reason if item.change is None else f"{movement(item)}  ({change(item)})"


def _measured(names: Sequence[str], run: Run) -> list[str]:
    """Return names with their figures, in the order of the metrics' table; zeros and names without one come last."""
    assert run.result is not None
    metrics, table = run.result.metrics, list(run.result.table)
    found = {name: find(name, run.result.table) for name in names if name in metrics}
    known = {name: metric for name, metric in found.items() if metric is not None}
    ordered = sorted(known, key=lambda name: (not metrics[name], table.index(known[name].name)))
    texts = [f"{name} {format_value(metrics[name], known[name].unit)}" for name in ordered]
    return [*texts, *(name for name in names if name not in known)]


def _total(decisions: Sequence[_Decision], options: argparse.Namespace) -> str:
    counts = Counter(map(_fate, decisions))
    total = ", ".join(f"{count} {word}" for word, count in counts.items())
    return f"{total} (--dry-run: nothing is written)" if options.dry_run else total


def _fate(decision: _Decision) -> str:
    if decision.refusal:
        return "refused"
    recording = decision.recordings[-1]
    if recording.accepted or recording.dropped:
        return ACCEPTED
    return "new" if recording.recorded else "as recorded already"
