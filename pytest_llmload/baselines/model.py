"""The content of one baseline file: the figures of one way of loading one model on one kind of device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.results import AllocationSite, ManifestRow, Numbers

#: Increased when an older release could misread what a newer one writes.
SCHEMA = 1
#: Significant digits of measured values, and of the ``numbers``.
DIGITS, NUMBER_DIGITS = 6, 9


@dataclass(frozen=True)
class RecordedTime:
    """A time metric on one kind of host."""

    #: Seconds: the median of the processes' medians.
    median: float
    #: Each process's samples in seconds, sorted; of many samples, their deciles.
    samples: tuple[tuple[float, ...], ...]
    #: Further conditions of the time: ``page_cache`` -> ``warm``.
    conditions: dict[str, str] = field(default_factory=dict)
    #: The same samples, each divided by the control's time around it; empty if no control ran.
    relative: tuple[tuple[float, ...], ...] = ()
    #: The control's median of each process, in seconds.
    control: tuple[float, ...] = ()
    #: The parts of the time in seconds: medians over the processes. They explain a change of the time; none is judged.
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """The content of one file; never changed in place."""

    #: Digest of the model's shape: memory, work and time are compared only while it is equal.
    shape: str
    #: Digest of the content of the model that the ``numbers`` belong to.
    weights: str
    #: ``LoadSpec.identity()``, portable.
    spec: dict[str, Any]
    workload: str
    #: Metric -> bytes or count.
    memory: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    #: Host class -> metric -> timing.
    time: dict[str, dict[str, RecordedTime]] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=Numbers)
    manifest: tuple[ManifestRow, ...] = ()
    #: The model's settings besides its modules; empty in baselines of releases that did not record them.
    settings: dict[str, str] = field(default_factory=dict)
    #: The lines that allocated the most memory outside the model, if the load was repeated to record them; they explain
    #: a failure and are not compared.
    allocations: tuple[AllocationSite, ...] = ()
    #: Environment of the memory, work and numbers; times have their own.
    environment: dict[str, str] = field(default_factory=dict)
    #: True if the installed ready-made suite recorded it: the project's own test files do not show that it is used.
    suite: bool = False

    def figures(self, section: str) -> dict[str, float]:
        """Return the metrics of ``memory`` or ``work``, by name."""
        return {"memory": self.memory, "work": self.work}[section]

    def median(self, host: str, metric: str) -> float | None:
        """Return the recorded median, in seconds, of a time metric on a kind of host, or None."""
        timing = self.time.get(host, {}).get(metric)
        return timing.median if timing else None


def has_numbers(numbers: Numbers) -> bool:
    """Return whether any of the numbers was measured."""
    return bool(numbers.logits or numbers.logsumexp or numbers.margin or numbers.buffers)


def rounding(values: Iterable[float]) -> float:
    """Return the largest error that storing these values in a file, with six or nine digits, may have caused."""
    known = [value for value in values if value and math.isfinite(value)]
    digits = DIGITS if all(value == significant(value) for value in known) else NUMBER_DIGITS
    return max((10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits) / 2 for value in known), default=0.0)


def significant(value: float, digits: int = DIGITS) -> float:
    """Return a measured value rounded to ``digits`` significant digits, so that diffs stay short."""
    return float(f"{value:.{digits}g}")


def compact(numbers: Numbers) -> Numbers:
    """Return numbers as they are stored, with all digits of an fp32.

    A log-sum-exp may be a hundred times larger than the logits that its error is judged by.
    """
    return Numbers(
        logits=[significant(value, NUMBER_DIGITS) for value in numbers.logits],
        logsumexp=[significant(value, NUMBER_DIGITS) for value in numbers.logsumexp],
        margin=[significant(value, NUMBER_DIGITS) for value in numbers.margin],
        buffers={name: [significant(value) for value in values] for name, values in numbers.buffers.items()},
        padded=[significant(value, NUMBER_DIGITS) for value in numbers.padded],
        layers={name: [significant(value) for value in values] for name, values in numbers.layers.items()},
        checksums=dict(numbers.checksums),
    )
