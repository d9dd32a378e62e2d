"""Record a run as plain data: the loads with all that was found about them, and which tests there were."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pytest_llmload.core import verdicts
from pytest_llmload.core.runs import Run
from pytest_llmload.core.spec import LoadSpec


@dataclass
class RunLog:
    """The log of one process of a run.

    A worker of pytest-xdist hands its log to the controller at its end, and the controller merges it into its own.
    """

    #: Each load with its report entry, in the order in which tests first used them.
    runs: dict[LoadSpec, Run] = field(default_factory=dict)
    #: Mistakes in markers: found while tests are parametrised, raised once collection is over.
    mistakes: list[str] = field(default_factory=list)
    #: Baseline files that a collected test uses.
    used_baselines: set[Path] = field(default_factory=set)
    #: True if a test that uses a load was selected.
    has_load_tests: bool = False
    #: True once all tests are collected.
    collected: bool = False
    #: True if tests were deselected, were not collected, or ended before they requested their loads.
    tests_left_out: bool = False
    #: True if tests of the ready-made suite were selected.
    suite_collected: bool = False
    #: Strategies that the ready-made suite does not load here, and why.
    left_out: dict[str, str] = field(default_factory=dict)
    #: Why loads were started with exec instead of being forked; None if they were forked.
    cold_reason: str | None = None

    def run(self, spec: LoadSpec, device_key: str) -> Run:
        """Return the report entry of a load, made at the first call."""
        return self.runs.setdefault(spec, Run(spec=spec, device_key=device_key))

    def merge(self, other: RunLog) -> None:
        """Add the log of another process of the same run; for a load that is in both, the worst outcome counts."""
        for spec, run in other.runs.items():
            known = self.runs.setdefault(spec, run)
            if known is not run:
                # The same load in two workers: another scheduler has split its tests.
                known.merge(run)
        self.mistakes += other.mistakes
        self.used_baselines |= other.used_baselines
        self.has_load_tests |= other.has_load_tests
        self.collected |= other.collected
        self.tests_left_out |= other.tests_left_out
        self.suite_collected |= other.suite_collected
        self.left_out |= other.left_out
        self.cold_reason = self.cold_reason or other.cold_reason


def note(run: Run, nodeid: str, outcome: str = verdicts.PASS, message: str = "") -> None:
    """Add a test's use of a load, and its outcome, to the report entry of the load."""
    if nodeid not in run.nodeids:
        run.nodeids.append(nodeid)
    severity = verdicts.SEVERITY
    first = len(run.nodeids) == 1 and not run.messages
    if first or severity.index(outcome) > severity.index(run.outcome):
        run.outcome = outcome
    if message and message not in run.messages:
        run.messages.append(message)
    if message and message not in run.failures and outcome in (verdicts.FAIL, verdicts.ERROR):
        run.failures.append(message)
