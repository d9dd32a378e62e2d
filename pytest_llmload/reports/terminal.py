"""Write the summary at the end of a run: one table of all loads, then what the user must know or decide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pytest_llmload.core.metrics import Metric
from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import format_bytes, format_seconds, format_value
from pytest_llmload.core.verdicts import IMPROVED, INCOMPARABLE, INCONCLUSIVE, UNAVAILABLE, MetricVerdict
from pytest_llmload.reports.layout import joined, limited, movement, shortened

#: Narrowest column of variants before figures are shortened, and then before some are omitted, never at 80 columns.
_VARIANT = 16
_NARROW = 6
_LINES = 10
_NAMES = 3
_GAP = "  "


@dataclass(frozen=True)
class _Column:
    title: str
    #: The title in a narrow terminal.
    short: str
    text: Callable[[Run], str]
    #: In a narrow terminal, columns with a higher number are omitted first; those with 0 are always shown.
    expendable: int = 0


def summary(runs: Sequence[Run], *, width: int, stale: Sequence[str] = (), notes: Sequence[str] = ()) -> list[str]:
    """Return the lines of the summary; those of the table have at most ``width`` characters.

    ``stale`` are baseline files that no test in this run uses; ``notes`` are facts about the run as a whole.
    """
    lines: list[str] = []
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.spec.name, run.device_key].append(run)
    for (model, device), members in groups.items():
        lines += [f"{model} on {device}", *_table(members, width)]
    lines += _section("improved, not accepted (--llm-update-baselines accepts)", _slack(runs))
    lines += _section("accepted", _written(runs, "accepted"))
    lines += _section("recorded", _written(runs, "recorded"))
    lines += _section("not compared", _asides(runs))
    lines += _section("stale baselines (not used by any test in this run)", stale)
    lines += _section("notes", [*notes, *_notes(runs)])
    return lines


# --- the table -------------------------------------------------------------------------------------------------------


def tokens_per_second(run: Run) -> float | None:
    """Return the generated tokens per second over the whole batch, or None if they were not measured."""
    per_token = _figure(run, "per_token")
    return run.spec.workload.batch / per_token if per_token else None


def _figure(run: Run, name: str) -> float | None:
    return run.result.metrics.get(name) if run.result else None


def _bytes(name: str) -> Callable[[Run], str]:
    return lambda run: _shown(_figure(run, name), format_bytes)


def _seconds(name: str) -> Callable[[Run], str]:
    return lambda run: _shown(_figure(run, name), format_seconds)


def _value(metric: Metric) -> Callable[[Run], str]:
    return lambda run: _shown(_figure(run, metric.name), lambda value: format_value(value, metric.unit))


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _columns(runs: Sequence[Run]) -> list[_Column]:
    on_gpu = any(name.startswith("gpu.") for run in runs if run.result for name in run.result.metrics)
    served = any("server.peak" in run.result.metrics for run in runs if run.result)
    # The table has the figures of the user's own probes if they are gated.
    declared = {
        metric.name: metric
        for run in runs
        for metric in (run.result.declared if run.result else ())
        if not metric.informative
    }
    side = "gpu" if on_gpu else "host"
    if on_gpu:
        peaks = [
            _Column("load peak", "load pk", _bytes("gpu.load_peak"), 2),
            _Column("gen peak", "gen pk", _bytes("gpu.generate_peak"), 3),
        ]
    else:
        peaks = [_Column("peak", "peak", _bytes("host.peak"), 2)]
    return [
        _Column("weights", "weights", _bytes(f"{side}.weights"), 1),
        _Column("settled", "settled", _bytes(f"{side}.settled")),
        *peaks,
        *([_Column("server peak", "srv pk", _bytes("server.peak"), 2)] if served else []),
        *(_Column(metric.name, metric.name, _value(metric), 7) for metric in declared.values()),
        _Column("load", "load", _seconds("load"), 4),
        _Column("ttft", "ttft", _seconds("ttft"), 6),
        _Column("tokens/s", "tok/s", lambda run: _shown(tokens_per_second(run), lambda value: f"{value:.1f}"), 5),
        _Column("verdict", "verdict", _verdict),
    ]


def _verdict(run: Run) -> str:
    return run.fate.replace("_", " ")


def _table(runs: Sequence[Run], width: int) -> list[str]:
    columns = _columns(runs)
    names = [run.spec.label for run in runs]
    longest = max(map(len, (*names, "variant")))
    cells, gap, least = [[column.title, *map(column.text, runs)] for column in columns], _GAP, _VARIANT
    while (room := _room(cells, width, gap)) < min(longest, least):
        if gap is not _GAP:
            most = max(column.expendable for column in columns)
            if not most:
                break
            columns = [column for column in columns if column.expendable != most]
        cells, gap, least = [[column.short, *map(_terse(column), runs)] for column in columns], " ", _NARROW
    first = max(min(longest, room), 1)
    sizes = [max(map(len, column)) for column in cells]
    lines = []
    for row, name in enumerate(["variant", *names]):
        # Align figures to the right, and the verdict, which is last, to the left.
        figures = [f"{column[row]:>{size}}" for column, size in zip(cells[:-1], sizes, strict=False)]
        lines.append(_GAP + gap.join([f"{shortened(name, first):<{first}}", *figures, cells[-1][row]]))
    return [line[:width].rstrip() for line in lines]


def _room(cells: Sequence[Sequence[str]], width: int, gap: str) -> int:
    """Return the number of characters that remain for the variant."""
    return width - len(_GAP) - sum(len(gap) + max(map(len, column)) for column in cells)


def _terse(column: _Column) -> Callable[[Run], str]:
    """Return a column's text in short form: ``6.64G`` for ``6.64 GiB``, ``12.31s`` for ``12.31 s``."""
    if column.text is _verdict:
        return column.text
    return lambda run: column.text(run).replace(" ", "").removesuffix("iB")


# --- the lists -------------------------------------------------------------------------------------------------------


def _section(title: str, lines: Sequence[str]) -> list[str]:
    # Indent the lines after the first in a text of several lines.
    entries = [text.replace("\n", f"\n{_GAP}").splitlines() for text in limited(lines, _LINES)]
    return [f"{title}:", *(f"{_GAP}{line}" for entry in entries for line in entry)] if lines else []


def _items(run: Run, *verdicts: str) -> list[MetricVerdict]:
    return [item for comparison in run.comparisons for item in comparison.having(*verdicts)]


def _slack(runs: Iterable[Run]) -> list[str]:
    """Return what improved, with the room that the old baseline leaves for a later regression to hide in."""
    lines = []
    for run in runs:
        if run.accepted:
            continue
        for item in _items(run, IMPROVED):
            # A time is judged over processes, and perhaps relative to the control's: its reason describes the change.
            left = f", leaves {format_value(abs(item.change or 0.0), item.unit)} of slack"
            why = f": {item.reason}" if item.reason else left
            lines.append(f"{run.spec.id}: {item.name} {movement(item)}{why}")
    return lines


def _written(runs: Iterable[Run], kind: str) -> list[str]:
    return [f"{run.baseline or run.spec.id}: {joined(names, _NAMES)}" for run in runs if (names := getattr(run, kind))]


def _asides(runs: Iterable[Run]) -> list[str]:
    """Return what passed without having been judged: each reason once, with its loads and metrics."""
    reasons: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = defaultdict(lambda: ({}, {}))
    for run in runs:
        for item in _items(run, INCOMPARABLE, INCONCLUSIVE, UNAVAILABLE):
            loads, metrics = reasons[item.verdict, item.reason]
            loads[run.spec.id] = None
            metrics[item.name] = None
    return [
        f"{joined(list(loads), _NAMES)}: {joined(list(metrics), _NAMES)} {verdict}, {reason}"
        for (verdict, reason), (loads, metrics) in reasons.items()
    ]


def _notes(runs: Iterable[Run]) -> list[str]:
    """Return the loads' notes; a note that several loads share is returned once."""
    owners: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        # pytest has shown in full what failed.
        messages = [text for text in run.messages if text not in run.failures]
        for text in (*messages, *(run.result.notes if run.result else ())):
            if run.spec.id not in owners[text]:
                owners[text].append(run.spec.id)
    return [f"{joined(ids, 2)}: {text}" for text, ids in owners.items()]
