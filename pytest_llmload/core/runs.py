"""One load of a session with all that was found of it: the reports are made of these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pytest_llmload.core.results import LOADED, LoadResult
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.core.verdicts import (
    ACCEPTED,
    CHANGED,
    ERROR,
    FAIL,
    IMPROVED,
    INCOMPARABLE,
    INCONCLUSIVE,
    MACHINE,
    MEASURED,
    MISSING,
    OK,
    OVER_LIMIT,
    PASS,
    RECORDED,
    REGRESSED,
    SEVERITY,
    SKIP,
    SKIPPED,
    TEST_FAILED,
    UNAVAILABLE,
    Comparison,
    merged,
    rank,
)


@dataclass(frozen=True)
class Subject:
    """The load that a text is about."""

    model: str
    #: The spec's slug.
    variant: str
    #: Directory of the device's baselines.
    device: str

    def __str__(self) -> str:
        return f"{self.model} / {self.variant} on {self.device}"


@dataclass
class Run:
    """One load of a session with all its verdicts and messages; the reports are made of these."""

    spec: LoadSpec
    device_key: str
    #: None if nothing was loaded, because the test was skipped or the machine was not able to.
    result: LoadResult | None = None
    comparisons: list[Comparison] = field(default_factory=list)
    #: Tests that used the load.
    nodeids: list[str] = field(default_factory=list)
    #: ``pass``, ``fail``, ``error`` or ``skip``.
    outcome: str = PASS
    #: Why it was skipped or is an error; the ceilings or budgets that were exceeded.
    messages: list[str] = field(default_factory=list)
    #: Those of ``messages`` that a failed test ended with: pytest shows them itself.
    failures: list[str] = field(default_factory=list)
    #: Ceilings and budgets that were exceeded, one sentence each.
    over_limits: list[str] = field(default_factory=list)
    #: The baseline's file, relative to the root directory.
    baseline: str = ""
    #: Names of the written entries: those that replaced older ones, and those that are new.
    accepted: list[str] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    #: The command that records or accepts what its last test found; empty if no test compares it with a baseline.
    command: str = ""
    #: Test -> ``file:line``, relative to the root directory; without tests that are outside of it.
    locations: dict[str, str] = field(default_factory=dict)
    #: The times of all timed processes, as a baseline keeps them: metric -> the entry of a baseline file.
    times: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: True if the installed ready-made suite checked it.
    suite: bool = False

    def add(self, comparisons: Iterable[Comparison]) -> None:
        """Add the comparisons of a check, merged with those of earlier checks of the same sections."""
        known = {comparison.section: comparison for comparison in self.comparisons}
        for comparison in comparisons:
            before = known.get(comparison.section)
            known[comparison.section] = merged(before, comparison) if before else comparison
        self.comparisons = list(known.values())

    @property
    def subject(self) -> Subject:
        """Return the load's model, variant and device."""
        return Subject(self.spec.name, self.spec.slug, self.device_key)

    @property
    def verdict(self) -> str:
        """Return one word: how a failed load ended, else the worst of its comparisons, or that it was written."""
        if self.result is None:
            return SKIPPED if self.outcome == SKIP else MACHINE
        if self.result.outcome != LOADED:
            return self.result.outcome
        decisive = max(self.comparisons, key=rank, default=None)
        failing = (MISSING, CHANGED, REGRESSED)
        if self.over_limits and (decisive is None or decisive.verdict not in failing or self._wrote(decisive)):
            return OVER_LIMIT
        if decisive is None:
            return MEASURED
        if not self._wrote(decisive):
            return decisive.verdict
        return ACCEPTED if self.accepted else RECORDED

    @property
    def fate(self) -> str:
        """Return the verdict, or what failed the load's tests if it is neither the load nor a comparison."""
        is_fine = self.verdict in (MEASURED, OK, RECORDED, ACCEPTED)
        # These fail under --llm-strict alone, and then without a message.
        is_fine |= bool(self.failures) and self.verdict in (IMPROVED, INCONCLUSIVE, UNAVAILABLE)
        return {FAIL: TEST_FAILED, ERROR: MACHINE}.get(self.outcome, self.verdict) if is_fine else self.verdict

    def _wrote(self, comparison: Comparison) -> bool:
        """Return whether the baseline now holds everything that gave a comparison its verdict."""
        written = {*self.accepted, *self.recorded}
        if comparison.whole:
            return bool(written) and comparison.verdict in (MISSING, INCOMPARABLE)
        names = {item.name for item in comparison.having(comparison.verdict)}
        return bool(names) and names <= written

    def merge(self, other: Run) -> None:
        """Merge what a different process of the session reported about the same load; the worst outcome counts."""
        # A run without tests does not have an outcome yet.
        outcomes = [run.outcome for run in (self, other) if run.nodeids]
        self.outcome = max(outcomes, key=SEVERITY.index, default=self.outcome)
        results = [run.result for run in (self, other) if run.result is not None]
        self.result = next((result for result in results if not result.ok), results[0] if results else None)
        self.add(other.comparisons)
        self.device_key = self.device_key or other.device_key
        self.baseline = self.baseline or other.baseline
        self.command = self.command or other.command
        self.locations = {**other.locations, **self.locations}
        self.times = {**other.times, **self.times}
        self.suite = self.suite or other.suite
        for name in ("nodeids", "messages", "failures", "over_limits", "accepted", "recorded"):
            own: list[str] = getattr(self, name)
            own += [text for text in getattr(other, name) if text not in own]
