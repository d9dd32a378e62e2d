"""Write the texts of failed tests: what changed, why, and the command that accepts it, all on the first screen."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from pytest_llmload.core.results import CRASHED, FAILED, NOT_APPLIED, OUT_OF_MEMORY, TIMEOUT, ErrorInfo, LoadResult
from pytest_llmload.core.runs import Subject
from pytest_llmload.core.units import counted, format_bytes, format_change, format_seconds, format_value
from pytest_llmload.core.verdicts import (
    CHANGED,
    IMPROVED,
    INCOMPARABLE,
    INCONCLUSIVE,
    MISSING,
    REGRESSED,
    UNAVAILABLE,
    UNEXPLAINED,
    Comparison,
    MetricVerdict,
)
from pytest_llmload.reports.layout import allowance, change, joined, labelled, limited, movement, shortened

#: Lines of one kind that are shown before the rest is only counted, so that a failure fits the first screen.
_METRICS = 12
_REASONS = 6
_NAMES = 4
#: Characters of the reason why a load failed, where a line is all there is.
_WHY = 200
#: Checks that fail if the model was loaded as requested, but raises when it runs.
_RUNNING = ("forward", "generate")
_SECTIONS = {"memory": "memory", "work": "work", "time": "latency"}
_PHASES = {"load": " while loading", "forward": " in the first forward", "generate": " while generating"}


def comparison_text(
    subject: Subject,
    comparison: Comparison,
    command: str,
    *,
    file: str = "",
    elsewhere: Sequence[str] = (),
    renamed: Sequence[str] = (),
    allocated: Sequence[str] = (),
    allocates: Sequence[str] = (),
) -> str:
    """Return the failure text of a comparison that does not pass.

    ``command`` writes the baseline, and ``file`` is its path. ``allocated`` are the lines of code that allocated the
    excess, ``allocates`` those that a prediction finds. For a missing baseline, ``elsewhere`` are devices for which
    this load has one, and ``renamed`` other names under which the same model has one.
    """
    section = _SECTIONS[comparison.section]
    if comparison.whole and comparison.verdict == MISSING:
        rows = [("because", comparison.reason), *_optional("file", file)]
        rows += _optional("elsewhere", f"recorded for {joined(elsewhere, _NAMES)}" if elsewhere else "")
        if renamed:
            names = f"the same model is recorded as {joined(renamed, _NAMES)}"
            rows.append(("renamed?", f"{names}: llmload rename {shlex.quote(renamed[0])} {shlex.quote(subject.model)}"))
        return _text(f"{section} baseline missing: {subject}", [*rows, ("record", command)])
    if comparison.whole:
        rows = [("because", comparison.reason), *_optional("file", file)]
        rows += _repeated("modules", [item.text for item in comparison.manifest])
        rows += _repeated("changed", comparison.changed)
        return _text(f"{section} baseline {comparison.verdict}: {subject}", [*rows, ("record", command)])
    # The lines that allocated it explain it.
    because = [reason for reason in comparison.because if not (allocated and reason == UNEXPLAINED)]
    rows = _repeated("because", because) if comparison.because else _repeated("modules", _modules(comparison))
    rows += _repeated("allocated", allocated)
    rows += [("allocates", text) for text in allocates]
    rows += _repeated("changed", comparison.changed)
    if comparison.verdict == UNAVAILABLE:
        # Nothing was measured that could replace the entries.
        remedy = "find out why it was not measured; if this load can never have it, delete the entry from the file"
        rows += [*_optional("file", file), ("remedy", remedy)]
        return _text(f"{section} {comparison.verdict}: {subject}", [*_metrics(comparison), *rows])
    word = "record" if comparison.verdict == MISSING else "accept"
    head = f"{section} {'baseline incomplete' if word == 'record' else comparison.verdict}: {subject}"
    return _text(head, [*_metrics(comparison), *rows, (word, command)])


def _modules(comparison: Comparison) -> list[str]:
    return [item.text for item in comparison.manifest]


def _metrics(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the metrics that changed; those that could not be judged only if nothing else is wrong."""
    wanted: tuple[str, ...] = (REGRESSED, IMPROVED, MISSING, CHANGED)
    if comparison.verdict in (INCOMPARABLE, INCONCLUSIVE, UNAVAILABLE):
        wanted = (comparison.verdict,)
    # The manifest's differences have their own lines.
    items = [item for item in comparison.having(*wanted) if item.name != "manifest" or item.verdict != CHANGED]
    items.sort(key=lambda item: wanted.index(item.verdict))
    width = max((len(movement(item)) for item in items if item.verdict in (REGRESSED, IMPROVED)), default=0)
    rows = [(item.name, _metric(item, width)) for item in items[:_METRICS]]
    rest = len(items) - _METRICS
    rows += [("…", f"and {counted(rest, 'more metric')}")] if rest > 0 else []
    if not rows and comparison.reason:
        rows = [("because", comparison.reason)]
    return rows


def _metric(item: MetricVerdict, width: int) -> str:
    if item.verdict in (REGRESSED, IMPROVED):
        note = "" if item.verdict == REGRESSED else ", improved"
        reason = f": {item.reason}" if item.reason else ""
        return f"{movement(item):<{width}}  ({change(item)}, {allowance(item)}{note}){reason}"
    if item.verdict == MISSING and item.current is not None:
        return f"{item.reason} (now {format_value(item.current, item.unit)})"
    figures = f" ({movement(item)})" if item.change is not None else ""
    return f"{item.reason}{figures}"


def not_applied_text(subject: Subject, result: LoadResult) -> str:
    """Return the failure text of a load whose model is not the requested one, or does not run."""
    rows: list[tuple[str, str]] = []
    for problem in result.problems:
        rows.append((problem.check, problem.message))
        # The two blanks show that the names belong to the line above.
        rows += [(problem.check, f"  {joined(problem.names, _NAMES)}")] if problem.names else []
        rows += _optional("hint", problem.hint)
    rows += _repeated("note", result.notes)
    # Only if nothing else is wrong, which would be the likelier cause.
    broken = all(problem.check in _RUNNING for problem in result.problems)
    return _text(f"{'does not run' if broken else f'{subject.variant} was not applied'}: {subject}", rows)


_ENDINGS = {
    OUT_OF_MEMORY: "out of memory",
    CRASHED: "the load's process died",
    TIMEOUT: "the load timed out",
    FAILED: "the load failed",
}
#: Lines of the traceback that are shown; the end says most. The log has been cut to its end already.
_TAIL = 25


def load_failure_text(subject: Subject, result: LoadResult) -> str:
    """Return the failure text of a load that did not end in the requested model."""
    if result.outcome == NOT_APPLIED:
        return not_applied_text(subject, result)
    error = result.error or ErrorInfo(message="no reason was given")
    rows = [("because", str(error)), *_optional("phase", "" if repr(error.phase) in str(error) else error.phase)]
    text = _text(f"{_ENDINGS[result.outcome]}: {subject}", rows)
    traceback, log = error.traceback.strip().splitlines()[-_TAIL:], error.log.strip().splitlines()
    for title, lines in (("traceback", traceback), ("last lines of the load's log", log)):
        if lines:
            text += "\n" + "\n".join([f"  {title}:", *(f"    {line}" for line in lines)])
    return text


def ending(result: LoadResult) -> str:
    """Return in one line how a load ended that did not end in the requested model, and why."""
    why = str(result.error) if result.error else "; ".join(problem.message for problem in result.problems)
    ended = "" if result.outcome == FAILED else result.outcome.replace("_", " ")
    return ": ".join(filter(None, ("the load failed", ended, shortened(" ".join(why.split()), _WHY))))


def ceiling_text(subject: Subject, place: str, value: float, limit: float, *, phase: str = "") -> str:
    """Return a sentence: ``place`` (``gpu.0`` or ``host``) held ``value`` bytes, more than ``memory_ceiling``."""
    where = f"GPU {place.partition('.')[2]}" if place.startswith("gpu.") else "the host"
    over = format_change(value - limit, "B").removeprefix("+")
    return (
        f"memory ceiling exceeded: {where} held {format_bytes(value)}{_PHASES.get(phase, '')}, "
        f"{over} over the ceiling of {format_bytes(limit)} ({subject})"
    )


def budget_text(
    subject: Subject,
    metric: str,
    value: float,
    limit: float,
    *,
    samples: int = 1,
    processes: int = 1,
    recorded: float | None = None,
) -> str:
    """Return a sentence: the median ``value``, in seconds, is over ``latency_budget``.

    The median is that of so many ``processes``, or of so many ``samples`` of one process. ``recorded`` is the
    baseline's median in seconds, if the budget is relative to it.
    """
    of = " (1 sample)"
    if processes > 1 or samples > 1:
        of = f" (median of {f'{processes} processes' if processes > 1 else f'{samples} samples'})"
    relative = (
        f", {100 * (limit / recorded - 1):+.0f} % over the recorded {format_seconds(recorded)}" if recorded else ""
    )
    return (
        f"latency budget exceeded: {metric} is {format_seconds(value)}{of}, "
        f"over the budget of {format_seconds(limit)}{relative} ({subject})"
    )


def _text(head: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([head, *labelled(rows)])


def _optional(label: str, text: str) -> list[tuple[str, str]]:
    return [(label, text)] if text else []


def _repeated(label: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(label, text) for text in limited(texts, _REASONS)]
