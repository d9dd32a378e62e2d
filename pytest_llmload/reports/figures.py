"""Derive the figures that reports show of a run: memory by phase, distributions, modules by kind, explanations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_llmload.core.metrics import MODEL_TIMES, PEAK_PHASES
from pytest_llmload.core.runs import Run
from pytest_llmload.core.verdicts import ERROR, FAIL, IMPROVED, Comparison, MetricVerdict
from pytest_llmload.reports import allocations
from pytest_llmload.reports.failure import comparison_text, load_failure_text


@dataclass(frozen=True)
class PhaseMemory:
    """The memory of one side (GPU or host) in one phase, as parts in bytes that add up to its peak."""

    phase: str
    peak: float
    weights: float
    #: Held after the load in addition to the weights.
    settled: float
    #: Held only temporarily.
    transient: float
    baseline: float | None


@dataclass(frozen=True)
class ModuleKind:
    """Modules of a model that are stored in the same way."""

    cls: str
    dtype: str
    device: str
    quant: str
    count: int
    bytes: int


def failed(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that failed or ended in an error, errors of the machine last."""
    return sorted((run for run in runs if run.outcome in (FAIL, ERROR)), key=lambda run: run.outcome == ERROR)


def improved(runs: Iterable[Run]) -> list[tuple[Run, MetricVerdict]]:
    """Return every figure that improved and was not accepted."""
    return [
        (run, item)
        for run in runs
        if not run.accepted
        for comparison in run.comparisons
        for item in comparison.having(IMPROVED)
    ]


def failing_parts(run: Run) -> list[Comparison]:
    """Return the parts of a failed run's comparisons that fail it; under ``--llm-strict`` there are more."""
    for strict in (False, True):
        parts = [part for each in run.comparisons if (part := each.failing(strict=strict)) is not None]
        if parts:
            return parts
    return []


def cause(run: Run) -> str:
    """Return the text that the tests of a failed run ended with, rebuilt from its figures."""
    if run.result is not None and not run.result.ok:
        return load_failure_text(run.subject, run.result)
    texts = []
    if run.outcome == FAIL:
        command = run.command or "pytest … --llm-update-baselines"
        parts = failing_parts(run)
        if all(part.whole for part in parts):
            # Each section says the same about the file.
            parts = parts[:1]
        texts = [
            comparison_text(
                run.subject,
                part,
                command,
                file=run.baseline,
                allocated=allocations.lines(run.result, part) if run.result else (),
            )
            for part in parts
        ]
    return "\n".join([*texts, *run.messages])


def verdict_of(run: Run, metric: str) -> MetricVerdict | None:
    """Return the verdict on a metric, or None if it was not compared."""
    return next(
        (item for comparison in run.comparisons for item in comparison.metrics if item.name == metric),
        None,
    )


def recorded(run: Run, metric: str) -> float | None:
    """Return the baseline's value of a metric, in its unit, or None."""
    found = verdict_of(run, metric)
    return found.baseline if found is not None else None


def memory(run: Run) -> dict[str, list[PhaseMemory]]:
    """Return the memory of each side that was measured, ``gpu`` and ``host``, phase by phase."""
    if run.result is None:
        return {}
    found: dict[str, list[PhaseMemory]] = {}
    peaks = {side: _peaks(run, side) for side in ("gpu", "host")}
    for side, by_phase in peaks.items():
        weights, settled = (run.result.metrics.get(f"{side}.{name}", 0.0) for name in ("weights", "settled"))
        for phase, (peak, baseline) in by_phase.items():
            own = min(weights, peak)
            rest = max(min(settled, peak) - own, 0.0)
            found.setdefault(side, []).append(PhaseMemory(phase, peak, own, rest, peak - own - rest, baseline))
    return found


def _peaks(run: Run, side: str) -> dict[str, tuple[float, float | None]]:
    """Return the highest figure of each phase and the baseline's, if it has one."""
    assert run.result is not None
    if side == "gpu":
        names = {phase: f"gpu.{phase}_peak" for phase in PEAK_PHASES}
        metrics = run.result.metrics
        return {
            phase: (metrics[name], recorded(run, name))
            for phase, name in names.items()
            if metrics.get(name) is not None
        }
    phases = {phase: peaks["host"] for phase, peaks in run.result.phase_peaks.items() if "host" in peaks}
    # For the host, the baseline has only the highest figure of all phases.
    highest = max(phases, key=phases.__getitem__, default="")
    return {
        phase: (peak, recorded(run, "host.peak") if phase == highest else None)
        for phase, peak in sorted(
            phases.items(), key=lambda item: PEAK_PHASES.index(item[0]) if item[0] in PEAK_PHASES else 9
        )
    }


def distributions(run: Run) -> dict[str, list[float]]:
    """Return the samples of each time in seconds: of all processes if several were timed, else of the load's own."""
    found: dict[str, list[float]] = {}
    if run.result is None:
        return found
    for name in MODEL_TIMES:
        processes = run.times.get(name, {}).get("samples", [])
        samples = [value for process in processes for value in process] or run.result.samples.get(name, [])
        if not samples and name in run.result.metrics:
            samples = [run.result.metrics[name]]
        if samples:
            found[name] = samples
    return found


def kinds(run: Run) -> list[ModuleKind]:
    """Return the modules of a load by kind, the largest first."""
    groups: dict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for row in run.result.manifest if run.result else ():
        group = groups[row.cls, row.dtype, row.device, row.quant]
        group[0] += row.count
        group[1] += row.bytes
    made = [ModuleKind(*names, count, size) for names, (count, size) in groups.items()]
    return sorted(made, key=lambda kind: -kind.bytes)


def work(run: Run) -> list[MetricVerdict]:
    """Return the counts of work, compared or only measured."""
    if run.result is None:
        return []
    found = []
    for name, value in sorted(run.result.metrics.items()):
        if name.partition(".")[0] in ("prefill", "token"):
            unit = "s" if name.endswith("time") else "1"
            found.append(verdict_of(run, name) or MetricVerdict(name, "measured", None, value, unit))
    return found


def changed(runs: Sequence[Run]) -> dict[str, int]:
    """Return the differences between the loads' environments and their baselines', each with the number of loads."""
    found: dict[str, int] = defaultdict(int)
    for run in runs:
        for text in dict.fromkeys(text for comparison in run.comparisons for text in comparison.changed):
            found[text] += 1
    return dict(found)


def environments(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the environment entries that all loads share, and the other entries of each load by its id."""
    known = {run.spec.id: run.result.environment for run in runs if run.result is not None and run.result.environment}
    if not known:
        return {}, {}
    first, *others = known.values()
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    own = {
        load: {name: value for name, value in environment.items() if name not in common}
        for load, environment in known.items()
    }
    return common, {load: rest for load, rest in own.items() if rest}
