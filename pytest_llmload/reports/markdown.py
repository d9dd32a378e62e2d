"""Write the Markdown report, for a pull request's comment or a job's summary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pytest_llmload.core.runs import Run
from pytest_llmload.core.units import counted, format_bytes, format_seconds
from pytest_llmload.reports import figures
from pytest_llmload.reports.headline import headline
from pytest_llmload.reports.layout import change, limited, movement, shortened
from pytest_llmload.reports.reading import Report, parse
from pytest_llmload.reports.terminal import tokens_per_second

#: Characters that a comment may have; GitHub accepts 65,536.
MOST = 60_000
#: Numbers of failures in full, of rows of the table and of lines of a list; the first triple that fits is used.
_LEVELS = ((200, 400, 200), (40, 200, 40), (12, 80, 12), (4, 20, 4), (1, 0, 0))
#: The most characters of one failure's text.
_TEXT = 6_000


def text(document: dict[str, Any]) -> str:
    """Return what changed, by how much and why, in fewer than 60,000 characters: a comment on a pull request."""
    return render(parse(document, "the report"))


def render(report: Report) -> str:
    """Return the report as Markdown of fewer than :data:`MOST` characters."""
    texts = (_text(report, *level) for level in _LEVELS)
    return next((text for text in texts if len(text) < MOST), _text(report, 0, 0, 0))


def _text(report: Report, failures: int, rows: int, entries: int) -> str:
    failed = figures.failed(report.runs)
    parts = [f"### {plain(headline(report.runs))}"]
    parts += [_failure(run) for run in failed[:failures]]
    if len(failed) > failures:
        parts.append(f"… and {len(failed) - failures} more that failed.")
    accept = list(dict.fromkeys(run.command for run in failed if run.command and figures.failing_parts(run)))
    if accept and failures:
        parts += ["To accept the changes, on any machine with this run's JSON report (`--llm-report=run.json`):"]
        parts += [_block("llmload accept run.json\ngit diff baselines/")]
        parts += ["Or measure again where the baselines are recorded:", _block("\n".join(limited(accept, 6)))]
    if report.runs and rows:
        parts.append(_table(report.runs, rows))
    slack = [
        f"{run.spec.id}: {item.name} {movement(item)} ({change(item)})" for run, item in figures.improved(report.runs)
    ]
    differing = [f"{text} ({counted(count, 'load')})" for text, count in figures.changed(report.runs).items()]
    for title, lines in (
        ("Differs from the baselines' environment", differing),
        ("Improved, not accepted", slack),
        ("Stale baselines: `llmload prune run.json` deletes them", report.stale),
        ("Notes", report.notes),
    ):
        if lines and entries:
            parts.append("\n".join([f"**{title}**", "", *(f"- {code(line)}" for line in limited(lines, entries))]))
    return "\n\n".join(parts) + "\n"


def _failure(run: Run) -> str:
    head = f"#### {run.fate.replace('_', ' ')}: {code(run.spec.id)}"
    return f"{head}\n\n{_block(shortened(figures.cause(run) or 'no reason was given', _TEXT))}"


def _table(runs: Sequence[Run], most: int) -> str:
    head = ["| load | device | verdict | weights | settled | peak | load | tokens/s |", "| --- " * 8 + "|"]
    lines = [_row(run) for run in sorted(runs, key=lambda run: run.outcome not in ("fail", "error"))[:most]]
    rest = len(runs) - most
    text = "\n".join([*head, *lines])
    more = f"\n\n… and {counted(rest, 'more load')}." if rest > 0 else ""
    return f"<details><summary>{counted(len(runs), 'load')}</summary>\n\n{text}{more}\n\n</details>"


def _row(run: Run) -> str:
    metrics = run.result.metrics if run.result else {}
    side = "gpu" if "gpu.settled" in metrics else "host"
    peak = "gpu.load_peak" if side == "gpu" else "host.peak"
    sizes = [metrics.get(name) for name in (f"{side}.weights", f"{side}.settled", peak)]
    speed = tokens_per_second(run)
    cells = [
        code(run.spec.id),
        code(run.device_key or "-"),
        f"**{run.fate.replace('_', ' ')}**" if run.outcome in ("fail", "error") else run.fate.replace("_", " "),
        *("–" if size is None else format_bytes(size) for size in sizes),
        "–" if (load := metrics.get("load")) is None else format_seconds(load),
        "–" if speed is None else f"{speed:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def code(text: str) -> str:
    """Return a text as inline code without markup, mentions or links, which also fits a table's cell."""
    flat = " ".join(text.split()) or "-"
    fence = "`" * (_longest_run(flat) + 1)
    pad = " " if flat[0] == "`" or flat[-1] == "`" else ""
    # A table splits at each | even in code; the backslash before it is not shown.
    escaped = flat.replace("|", "\\|")
    return f"{fence}{pad}{escaped}{pad}{fence}"


def plain(text: str) -> str:
    """Return a text with every character escaped that is special in Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#!|~@&])", r"\\\1", text)


def _block(text: str) -> str:
    fence = "`" * max(_longest_run(text) + 1, 3)
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
