"""The verdicts of a comparison with a baseline, and the effect of each verdict on a test.

The table of verdicts is data (:data:`TABLE`): the gate, the reports and the documentation read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pytest_llmload.core.results import CRASHED, FAILED, NOT_APPLIED, OUT_OF_MEMORY, TIMEOUT
from pytest_llmload.core.units import Tolerance

OK = "ok"
IMPROVED = "improved"
CHANGED = "changed"
REGRESSED = "regressed"
MISSING = "missing"
INCOMPARABLE = "incomparable"
INCONCLUSIVE = "inconclusive"
UNAVAILABLE = "unavailable"

#: Rows of the table that are not verdicts of a comparison.
SKIPPED = "skipped"
STALE = "stale"
MACHINE = "machine"
NOTHING_MEASURED = "nothing_measured"
#: A run's verdict if it exceeded a ceiling or a budget of a test, whatever its comparisons say.
OVER_LIMIT = "over_limit"
#: A run's fate if a test of its load failed for a reason of its own.
TEST_FAILED = "test_failed"
#: A run's verdict if no test compares it with a baseline.
MEASURED = "measured"
#: A run's verdict if the entry that decides it was written: over an old entry, or as a new one.
ACCEPTED = "accepted"
RECORDED = "recorded"

PASS = "pass"
FAIL = "fail"
ERROR = "error"
SKIP = "skip"
#: Outcomes of a load's tests, from harmless to worst.
SEVERITY = (SKIP, PASS, FAIL, ERROR)

#: Verdicts from harmless to worst; ``incomparable`` is placed for a single metric (see :func:`rank`).
_ORDER = (MEASURED, OK, UNAVAILABLE, INCONCLUSIVE, INCOMPARABLE, IMPROVED, MISSING, CHANGED, REGRESSED)

EXACT = Tolerance()

#: The reason where a comparison found no other one.
UNEXPLAINED = "nothing recorded explains it: modules, loading work and library versions are the same"


@dataclass(frozen=True)
class Outcome:
    """The effect of a verdict."""

    #: ``pass``, ``fail``, ``error`` or ``skip``.
    status: str
    #: True if the baseline is written (as far as something was measured).
    writes: bool = False
    #: The list of the summary that names the load: ``slack``, ``accepted``, ``recorded``, ``once``, ``stale`` or none.
    listed: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the table: some verdicts, and their outcome in each mode."""

    verdicts: tuple[str, ...]
    default: Outcome
    strict: Outcome
    update: Outcome
    record_missing: Outcome
    #: True if the row is about a single metric, and a different row has the same word for a whole load.
    metric_only: bool = False


_PASS, _FAIL, _ERROR, _SKIP = Outcome(PASS), Outcome(FAIL), Outcome(ERROR), Outcome(SKIP)
_ONCE = Outcome(PASS, listed="once")
_ACCEPTED = Outcome(PASS, writes=True, listed="accepted")
_RECORDED = Outcome(PASS, writes=True, listed="recorded")
_SLACK = Outcome(PASS, listed="slack")
_STALE = Outcome(PASS, listed="stale")

TABLE: tuple[Row, ...] = (
    Row((OK,), _PASS, _PASS, _PASS, _PASS),
    Row((REGRESSED, CHANGED), _FAIL, _FAIL, _ACCEPTED, _FAIL),
    Row((IMPROVED,), _SLACK, _FAIL, _ACCEPTED, _SLACK),
    Row((MISSING,), _FAIL, _FAIL, _RECORDED, _RECORDED),
    # The load has an entry, so "record what is missing" gates it like any other.
    Row((INCOMPARABLE,), _FAIL, _FAIL, _RECORDED, _FAIL),
    Row((INCOMPARABLE,), _ONCE, _FAIL, _ACCEPTED, _ONCE, metric_only=True),
    Row((INCONCLUSIVE,), _ONCE, _FAIL, _ACCEPTED, _ONCE),
    # Nothing was measured, so there is nothing to write.
    Row((UNAVAILABLE,), _ONCE, _FAIL, _ONCE, _ONCE),
    Row((NOT_APPLIED, OUT_OF_MEMORY, CRASHED, TIMEOUT, FAILED), _FAIL, _FAIL, _FAIL, _FAIL),
    Row((OVER_LIMIT,), _FAIL, _FAIL, _FAIL, _FAIL),
    Row((MACHINE,), _ERROR, _ERROR, _ERROR, _ERROR),
    Row((SKIPPED,), _SKIP, _ERROR, _SKIP, _SKIP),
    Row((STALE,), _STALE, _ERROR, _STALE, _STALE),
    Row((NOTHING_MEASURED,), _ERROR, _ERROR, _ERROR, _ERROR),
)


def outcome(
    verdict: str,
    *,
    strict: bool = False,
    update: bool = False,
    record_missing: bool = False,
    metric_only: bool = False,
) -> Outcome:
    """Return the effect of ``verdict`` under these options; ``metric_only``: the verdict is about a single metric.

    What update or record-missing writes is thereby accepted, under strict too; strict decides about the rest.
    Raises KeyError for a word that is not a verdict.
    """
    rows = [row for row in TABLE if verdict in row.verdicts]
    if not rows:
        raise KeyError(f"{verdict!r} is not a verdict")
    row = next((row for row in rows if row.metric_only == metric_only), rows[0])
    mode = row.update if update else row.record_missing if record_missing else None
    if mode is not None and (mode.writes or not strict):
        return mode
    return row.strict if strict else row.default


@dataclass(frozen=True)
class MetricVerdict:
    """The verdict on one metric, or on the ``numbers``, against its baseline."""

    name: str
    verdict: str
    #: In the metric's unit; None if the baseline has no such value.
    baseline: float | None = None
    current: float | None = None
    unit: str = "1"
    tolerance: Tolerance = EXACT
    #: One short sentence, if the verdict needs one.
    reason: str = ""
    #: True if the metric is reported without being part of the overall verdict.
    informative: bool = False

    @property
    def change(self) -> float | None:
        """Return ``current - baseline``, or None unless both are known."""
        return None if self.baseline is None or self.current is None else self.current - self.baseline


@dataclass(frozen=True)
class ManifestChange:
    """One difference between two manifests, as a readable sentence."""

    text: str
    #: Number of modules that differ.
    modules: int
    #: Bytes more (or, negative, less) than before.
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """One section of one load (``memory``, ``work`` or ``time``) against its baseline."""

    section: str
    verdict: str
    #: True if the verdict is about the load as a whole: without a baseline, or with one of a different shape, spec or
    #: workload.
    whole: bool = False
    #: One sentence, if the verdict is about the whole.
    reason: str = ""
    metrics: tuple[MetricVerdict, ...] = ()
    manifest: tuple[ManifestChange, ...] = ()
    #: Explanations of the metrics that changed.
    because: tuple[str, ...] = ()
    #: Differences of the environment: ``bitsandbytes 0.50.1 -> 0.50.2``.
    changed: tuple[str, ...] = ()

    def having(self, *verdicts: str) -> tuple[MetricVerdict, ...]:
        """Return the gating metrics with one of these verdicts."""
        return tuple(item for item in self.metrics if not item.informative and item.verdict in verdicts)

    def outcome(self, *, strict: bool = False, update: bool = False, record_missing: bool = False) -> Outcome:
        """Return the effect of this comparison on its test: each metric has an outcome, and the worst status counts."""
        words = dict.fromkeys(item.verdict for item in self._judged) or [self.verdict]
        found = [self._outcome(word, strict, update, record_missing) for word in words]
        hardest = max(found, key=lambda each: SEVERITY.index(each.status))
        return replace(hardest, writes=any(each.writes for each in found))

    def failing(self, *, strict: bool = False, update: bool = False, record_missing: bool = False) -> Comparison | None:
        """Return the part that fails its test, without metrics that pass or are written; None if the test passes."""
        if self.outcome(strict=strict, update=update, record_missing=record_missing).status != FAIL:
            return None
        failed = tuple(
            item for item in self._judged if self._outcome(item.verdict, strict, update, record_missing).status == FAIL
        )
        if not failed:
            return self
        moved = any(item.verdict in (REGRESSED, IMPROVED) for item in failed)
        verdict = worst(item.verdict for item in failed)
        return replace(self, verdict=verdict, metrics=failed, because=self.because if moved else ())

    @property
    def _judged(self) -> tuple[MetricVerdict, ...]:
        """Return the metrics that decide; none if the verdict is about the whole."""
        return () if self.whole else tuple(item for item in self.metrics if not item.informative)

    def _outcome(self, verdict: str, strict: bool, update: bool, record_missing: bool) -> Outcome:
        return outcome(verdict, strict=strict, update=update, record_missing=record_missing, metric_only=not self.whole)


def worst(verdicts: Iterable[str]) -> str:
    """Return the worst of the metrics' verdicts; ``ok`` if there are none."""
    return max(verdicts, key=_ORDER.index, default=OK)


def rank(comparison: Comparison) -> int:
    """Return the comparison's place among others, from the best to the worst.

    A comparison that is incomparable as a whole gates nothing, which is as bad as having no baseline.
    """
    whole = comparison.whole and comparison.verdict == INCOMPARABLE
    return _ORDER.index(MISSING if whole else comparison.verdict)


def merged(one: Comparison, other: Comparison) -> Comparison:
    """Return what two checks of one section of a load say together.

    Each metric gets the worse of its two verdicts, and of two equal ones the later.
    """
    metrics = {item.name: item for item in one.metrics}
    for item in other.metrics:
        before = metrics.get(item.name)
        if before is None or _ORDER.index(item.verdict) >= _ORDER.index(before.verdict):
            metrics[item.name] = item
    return replace(
        max(other, one, key=rank),
        metrics=tuple(metrics.values()),
        manifest=tuple(dict.fromkeys((*one.manifest, *other.manifest))),
        because=tuple(dict.fromkeys((*one.because, *other.because))),
        changed=tuple(dict.fromkeys((*one.changed, *other.changed))),
    )
