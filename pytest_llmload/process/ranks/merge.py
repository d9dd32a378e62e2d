"""Merge the results of several ranks into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pytest_llmload.core.job import Job
from pytest_llmload.core.metrics import find
from pytest_llmload.core.results import LOAD_PARTS, LOADED, NOT_APPLIED, LoadResult, ManifestRow, Numbers, Problem
from pytest_llmload.core.units import plural

#: Relative difference above which ranks disagree; the order of a sum changes the logits by less.
_DISAGREE = 1e-2
#: Metrics of one rank that are reported besides the sums: metric -> its name under ``shard.<rank>.``.
_PER_RANK = {"weights.logical": "logical", "host.peak": "peak", "host.settled": "settled"}


def merge(job: Job, by_rank: Mapping[int, LoadResult]) -> LoadResult:
    """Return one result of all ranks.

    Memory is summed, and each GPU is listed under its rank's number. The load's time is the slowest rank's, the tokens'
    times are the first rank's. Problems and notes that not all ranks have name their ranks.
    """
    results = dict(sorted(by_rank.items()))
    first = next(iter(results.values()))
    slowest = max(results.values(), key=lambda result: result.phases.get("load", 0.0))
    problems = _problems(results) + _disagreement(results)
    merged = dataclasses.replace(
        first,
        outcome=NOT_APPLIED if problems else LOADED,
        problems=problems,
        faults=list({fault.message: fault for result in results.values() for fault in result.faults}.values()),
        metrics=_metrics(results),
        unavailable={name: why for result in results.values() for name, why in result.unavailable.items()},
        phase_peaks=_phase_peaks(results),
        phases=_phases(results, slowest),
        phase_samples=slowest.phase_samples,
        ledger=[{**row, "gpu": rank} for rank, result in results.items() for row in result.ledger],
        manifest=_manifest(results),
        notes=_said({rank: result.notes for rank, result in results.items()}),
        environment={**first.environment, "ranks": str(job.spec.world_size)},
    )
    if "load" in first.metrics:
        merged.metrics["load"] = slowest.metrics["load"]
        own = {name: samples for name, samples in slowest.samples.items() if name.partition(".")[0] == "load"}
        merged.samples = {**first.samples, **own}
    merged.unavailable = {name: why for name, why in merged.unavailable.items() if name not in merged.metrics}
    return merged


def _phases(results: Mapping[int, LoadResult], slowest: LoadResult) -> dict[str, float]:
    """Return each phase's time of its slowest rank; the parts of the load are one rank's, so that they add up."""
    longest = {
        name: max(result.phases.get(name, 0.0) for result in results.values())
        for name in {name: None for result in results.values() for name in result.phases if name not in LOAD_PARTS}
    }
    return longest | {name: slowest.phases[name] for name in LOAD_PARTS if name in slowest.phases}


def _metrics(results: Mapping[int, LoadResult]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for rank, result in results.items():
        for name, value in result.metrics.items():
            if name.startswith("gpu.0."):
                # Each rank sees one GPU only, as its first.
                merged[f"gpu.{rank}.{name.removeprefix('gpu.0.')}"] = value
            elif name.startswith("shard.") or _is_time(name, result):
                merged.setdefault(name, value)
            else:
                merged[name] = merged.get(name, 0) + value
        for name, short in _PER_RANK.items():
            if name in result.metrics:
                merged[f"shard.{rank}.{short}"] = result.metrics[name]
    # A figure that one rank could not measure has no sum.
    return {
        name: value
        for name, value in merged.items()
        if name.startswith(("gpu.", "shard.")) or _everywhere(name, results)
    }


def _is_time(name: str, result: LoadResult) -> bool:
    metric = find(name, result.table)
    return metric is not None and metric.section == "time"


def _everywhere(name: str, results: Mapping[int, LoadResult]) -> bool:
    return all(name in result.metrics for result in results.values())


def _phase_peaks(results: Mapping[int, LoadResult]) -> dict[str, dict[str, float]]:
    merged: dict[str, dict[str, float]] = {}
    for rank, result in results.items():
        for phase, peaks in result.phase_peaks.items():
            place = merged.setdefault(phase, {})
            for name, value in peaks.items():
                if name == "gpu.0":
                    place[f"gpu.{rank}"] = value
                else:
                    place[name] = place.get(name, 0) + value
    return merged


def _problems(results: Mapping[int, LoadResult]) -> list[Problem]:
    found: dict[Problem, list[int]] = {}
    for rank, result in results.items():
        for problem in result.problems:
            found.setdefault(problem, []).append(rank)
    return [
        problem
        if len(ranks) == len(results) or problem.rank is not None
        else dataclasses.replace(problem, message=f"{_ranks(ranks)}: {problem.message}")
        for problem, ranks in found.items()
    ]


def _said(texts: Mapping[int, Iterable[str]]) -> list[str]:
    found: dict[str, list[int]] = {}
    for rank, lines in texts.items():
        for line in lines:
            found.setdefault(line, []).append(rank)
    # A problem of the first rank only concerns all: it compares the output on behalf of the others.
    return [
        line if len(ranks) == len(texts) or ranks == [0] else f"{_ranks(ranks)}: {line}"
        for line, ranks in found.items()
    ]


def _ranks(ranks: list[int]) -> str:
    return f"{plural(len(ranks), 'rank')} {', '.join(map(str, ranks))}"


def _disagreement(results: Mapping[int, LoadResult]) -> list[Problem]:
    """Return a problem for each rank whose logits differ from the first rank's: they do not compute one model."""
    (zero, first), *others = results.items()
    return [
        Problem(
            "ranks",
            f"rank {rank}'s logits are {error:.2e} off rank {zero}'s: they do not run one model together",
            rank=rank,
        )
        for rank, result in others
        if not (error := _distance(result.numbers, first.numbers)) <= _DISAGREE
    ]


def _distance(one: Numbers, other: Numbers) -> float:
    # This is not worker.model.relative_error, which compares whole tensors and returns infinity for NaN: a result holds
    # a few logits as floats, and a rank whose logits are NaN is reported with NaN.
    if len(one.logits) != len(other.logits):
        return math.inf
    size = math.sqrt(sum(value**2 for value in other.logits))
    difference = math.sqrt(sum((a - b) ** 2 for a, b in zip(one.logits, other.logits, strict=True)))
    return difference / size if size else difference


def _manifest(results: Mapping[int, LoadResult]) -> list[ManifestRow]:
    """Return the rows: one for all ranks if it is alike on all of them, else each under its rank's name."""
    rows: dict[tuple[Any, ...], list[tuple[int, ManifestRow]]] = {}
    for rank, result in results.items():
        for row in result.manifest:
            rows.setdefault(dataclasses.astuple(row), []).append((rank, row))
    merged = []
    for held in rows.values():
        row = held[0][1]
        if len(held) == len(results):
            device = f"{len(held)} x {row.device.partition(':')[0]}"
            merged.append(
                dataclasses.replace(row, device=device, count=row.count * len(held), bytes=row.bytes * len(held))
            )
        else:
            merged += [
                dataclasses.replace(
                    other,
                    module=f"rank{rank}.{other.module}".rstrip("."),
                    device=f"{other.device.partition(':')[0]} of rank {rank}",
                )
                for rank, other in held
            ]
    return sorted(merged, key=lambda row: (row.module, row.indices))
