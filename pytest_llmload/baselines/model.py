"""What one baseline file holds: the figures of one way of loading one model on one kind of device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.results import ManifestRow, Numbers

#: Raised when an older release could misread what a newer one writes.
SCHEMA = 1
#: Significant digits of measured values, and of the ``numbers``.
DIGITS, NUMBER_DIGITS = 6, 9


@dataclass(frozen=True)
class Timing:
    """A time metric on one kind of host."""

    #: Seconds: the median of the processes' medians.
    median: float
    #: Of each process its samples in seconds, sorted; of many, their deciles.
    samples: tuple[tuple[float, ...], ...]
    #: What else it depends on: ``page_cache`` -> ``warm``.
    conditions: dict[str, str] = field(default_factory=dict)
    #: The same samples divided by the control's time around each; empty where no control ran.
    relative: tuple[tuple[float, ...], ...] = ()
    #: Of each process the control's median in seconds.
    control: tuple[float, ...] = ()
    #: What the time is made of, in seconds: medians of the processes. A reason where the time moves, never judged.
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """The content of one file; never changed in place."""

    #: Digest of the model's shape: memory, work and time are compared only while it is equal.
    shape: str
    #: Digest of the model's content, of the load whose ``numbers`` these are.
    weights: str
    #: ``LoadSpec.identity()``, portable.
    spec: dict[str, Any]
    workload: str
    #: Metric -> bytes or count.
    memory: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    #: Host class -> metric -> timing.
    time: dict[str, dict[str, Timing]] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=Numbers)
    manifest: tuple[ManifestRow, ...] = ()
    #: What the model is besides its modules; empty in baselines of releases that did not record it.
    settings: dict[str, str] = field(default_factory=dict)
    #: Surroundings of the memory, work and numbers; times have their own.
    environment: dict[str, str] = field(default_factory=dict)
    #: Whether the installed ready-made suite recorded it: no test file of the project says that it is used.
    suite: bool = False

    def figures(self, section: str) -> dict[str, float]:
        """The metrics of ``memory`` or ``work``."""
        return {"memory": self.memory, "work": self.work}[section]

    def median(self, host: str, metric: str) -> float | None:
        """The recorded median in seconds of a time metric on a kind of host, if there is one."""
        timing = self.time.get(host, {}).get(metric)
        return timing.median if timing else None


def has_numbers(numbers: Numbers) -> bool:
    """Whether anything was measured."""
    return bool(numbers.logits or numbers.logsumexp or numbers.margin or numbers.buffers)


def rounding(values: Iterable[float]) -> float:
    """Return the largest error that storing these values in a file may have made: with six digits or with nine."""
    known = [value for value in values if value and math.isfinite(value)]
    digits = DIGITS if all(value == significant(value) for value in known) else NUMBER_DIGITS
    return max((10.0 ** (math.floor(math.log10(abs(value))) + 1 - digits) / 2 for value in known), default=0.0)


def significant(value: float, digits: int = DIGITS) -> float:
    """A measured value without the digits that only make a diff longer."""
    return float(f"{value:.{digits}g}")


def compact(numbers: Numbers) -> Numbers:
    """Numbers as they are stored.

    With all digits of an fp32: a log-sum-exp may be a hundred times larger than the logits that its error is judged by.
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
