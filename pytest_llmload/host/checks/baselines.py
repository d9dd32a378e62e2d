"""``memory_baseline`` and ``latency_baseline``: compare a load with its baseline in git, and write accepted values."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import pytest

from pytest_llmload.baselines.allocations import beside
from pytest_llmload.baselines.codec import timing_entry
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.model import Baseline, RecordedTime
from pytest_llmload.baselines.record import Recording, record
from pytest_llmload.baselines.timings import LOAD, LOADS, LOOKS, timings
from pytest_llmload.core import verdicts
from pytest_llmload.core.errors import (
    BaselineError,
    BaselineIncomparable,
    BaselineMissing,
    LatencyRegressed,
    LoadError,
    MachineError,
    MemoryRegressed,
)
from pytest_llmload.core.metrics import section_of, tolerance_of
from pytest_llmload.core.verdicts import Comparison
from pytest_llmload.host.loads.llm import LLM
from pytest_llmload.host.loads.timing_rounds import until_clear
from pytest_llmload.host.run.stash import state_of
from pytest_llmload.host.run.state import State
from pytest_llmload.host.run.suite import SUITE
from pytest_llmload.prediction.devices import PREDICTED
from pytest_llmload.reports import allocations, failure
from pytest_llmload.reports.prediction import origins

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.core.units import Tolerance
    from pytest_llmload.host.loads.load import Load


class _Gate(ABC):
    """One section of the baselines, for one test."""

    #: The name of its fixture.
    fixture: ClassVar[str]
    #: The first one's comparison is what ``check`` gives.
    sections: ClassVar[tuple[str, ...]]
    #: Sections of the file that are written with it.
    recorded: ClassVar[tuple[str, ...]]
    regressed: ClassVar[type[AssertionError]]

    def __init__(self, state: State, item: pytest.Item) -> None:
        self._state = state
        self._item = item

    @classmethod
    def of(cls, config: pytest.Config, item: pytest.Item) -> Self:
        """Return the gate of a test. Raises BaselineError, in the test's setup, if its baseline cannot be read."""
        state = state_of(config)
        gate = cls(state, item)
        spec = state.spec_of(item)
        if spec is not None:
            state.store.read(state.baseline_path(spec))
        return gate

    def check(
        self,
        llm: LLM,
        metrics: Sequence[str] | None = None,
        tolerance: Mapping[str, str | Tolerance] | None = None,
    ) -> Comparison | None:
        """Compare a load with its baseline; None under ``--llm-isolation=inline``, which gates nothing.

        ``metrics`` limits the comparison to some metrics; ``tolerance`` maps metrics to ``"1%"`` or ``"8MiB"``, over
        ``--llm-tolerance``. Raises what the load failed with, BaselineMissing, BaselineIncomparable, and
        MemoryRegressed or LatencyRegressed, each with the command that records or accepts; ValueError for a name or a
        tolerance that means nothing here.
        """
        __tracebackhide__ = True
        try:
            self._check_names(metrics)
            given = {
                name: tolerance_of(name, value, self._state.probes.table) for name, value in (tolerance or {}).items()
            }
        except (KeyError, ValueError) as wrong:
            raise ValueError(f"{self.fixture}.check: {wrong.args[0]}") from None
        if not isinstance(llm, LLM):
            raise TypeError(
                f"{self.fixture}.check takes a load (the fixture llm, or what llm_load returns); got {llm!r:.80}"
            )
        load: Load = llm._load
        settings, state = self._state.settings, self._state
        path = state.baseline_path(load.spec)
        # No fixture could name it before the test ran if the load is of llm_load, or the gate from getfixturevalue.
        state.log.used_baselines.add(path)
        if (error := load.error) is not None:
            raise error
        if settings.inline or (settings.predict and "memory" not in self.sections):
            return None
        if settings.predict:
            metrics = [name for name in PREDICTED if metrics is None or name in metrics]
            if not metrics:
                return None
        tolerances = {**settings.tolerances, **given}
        baseline = state.store.read(path)
        comparisons = self._compare(load, baseline, metrics, tolerances)
        run = state.run(load.spec)
        run.baseline = state.display(path)
        run.command = state.command(self._item, load.spec)
        run.suite = run.suite or self._item.path.parent == SUITE
        run.add(comparisons)
        mode = {
            "strict": settings.strict,
            "update": settings.update_baselines,
            "record_missing": settings.record_missing,
        }
        if any(item.outcome(**mode).writes for item in comparisons) or self._is_to_be_explained(baseline):
            self._write(load, path, metrics, tolerances)
        failed = [part for item in comparisons if (part := item.failing(**mode)) is not None]
        if failed:
            raise self._failure(load, failed, baseline)
        return comparisons[0]

    def _check_names(self, metrics: Sequence[str] | None) -> None:
        """Raise KeyError for an unknown metric, and ValueError for anything but a list of this gate's metrics."""
        if metrics is None:
            return
        if isinstance(metrics, str) or not metrics:
            raise ValueError(f"metrics={metrics!r} is not a list of metrics: omit it, or name some, as in ['load']")
        for name in metrics:
            section = section_of(name, self._state.probes.table)
            if section not in self.sections:
                raise ValueError(f"{name!r} is a figure of the {section} baseline: use {_FIXTURES[section]}.check")

    def _compare(
        self,
        load: Load,
        baseline: Baseline | None,
        metrics: Sequence[str] | None,
        tolerances: Mapping[str, Tolerance],
        times: Mapping[str, RecordedTime] | None = None,
    ) -> list[Comparison]:
        """Compare every section of the gate, or those that ``metrics`` belong to."""
        chosen: dict[str, list[str] | None] = dict.fromkeys(self.sections)
        if metrics is not None:
            homes = {name: section_of(name, load.result.table) for name in metrics}
            chosen = {
                section: [name for name in metrics if homes[name] == section]
                for section in self.sections
                if section in homes.values()
            }
        return [
            compare(baseline, load.result, metrics=names, tolerances=tolerances, section=section, times=times)
            for section, names in chosen.items()
        ]

    @abstractmethod
    def _results(self, load: Load, count: int, metrics: Sequence[str] | None) -> list[LoadResult]:
        """Return ``count`` results of the load to record ``metrics`` of.

        Raises LoadError if a repeat does not end in a model.
        """

    def _is_to_be_explained(self, baseline: Baseline | None) -> bool:
        """Return whether a baseline has to be written only since it lacks the lines that allocate."""
        return False

    def _times(self, load: Load, metrics: Sequence[str] | None) -> Mapping[str, RecordedTime] | None:
        """Return the times to record, or None if they are those of the results."""
        return None

    def _write(
        self, load: Load, path: Path, metrics: Sequence[str] | None, tolerances: Mapping[str, Tolerance]
    ) -> None:
        __tracebackhide__ = True
        settings = self._state.settings
        run = self._state.run(load.spec)
        try:
            results = self._results(load, settings.record_repeats, metrics)
            times = self._times(load, metrics)
        except LoadError as error:
            text = "not recorded, since the load was repeated for it and did not end in a model this time"
            run.messages += [text] if text not in run.messages else []
            raise type(error)(f"{text}\n{error}", error.result) from None
        done: list[Recording] = []

        def change(existing: Baseline | None) -> Baseline | None:
            done.append(
                record(
                    existing,
                    results,
                    update=settings.update_baselines,
                    sections=self.recorded,
                    metrics=metrics,
                    tolerances=tolerances,
                    times=times,
                    suite=self._item.path.parent == SUITE,
                )
            )
            return done[-1].baseline

        self._state.store.update(path, change)
        recording = done[-1]
        if recording.refusals:
            text = "; ".join(recording.refusals)
            raise MachineError(f"{self._state.subject(load.spec)}: not recorded, since repeats differ: {text}")
        run.accepted += [name for name in recording.accepted if name not in run.accepted]
        run.recorded += [name for name in recording.recorded if name not in run.recorded]
        run.messages += [text for text in recording.dropped if text not in run.messages]

    def _failure(self, load: Load, failed: Sequence[Comparison], baseline: Baseline | None) -> AssertionError:
        state, spec = self._state, load.spec
        if not state.settings.predict and any(map(allocations.is_explained, failed)):
            load.record_allocations()
            load.result.allocations = beside(load.result.allocations, baseline.allocations if baseline else ())
        text = "\n".join(
            failure.comparison_text(
                state.subject(spec),
                comparison,
                state.command(self._item, spec),
                file=state.display(state.baseline_path(spec)),
                elsewhere=state.store.devices(spec.name, spec.slug),
                renamed=_other_names(state, spec, load.result.digests)
                if comparison.verdict == verdicts.MISSING
                else (),
                allocated=allocations.lines(load.result, comparison),
                allocates=self._origins(load, comparison),
            )
            for comparison in failed
        )
        if all(comparison.verdict == verdicts.MISSING for comparison in failed):
            return BaselineMissing(text)
        if all(comparison.verdict == verdicts.INCOMPARABLE and comparison.whole for comparison in failed):
            return BaselineIncomparable(text)
        return self.regressed(text)

    def _origins(self, load: Load, failed: Comparison) -> list[str]:
        """Return what allocates more, if the load was predicted."""
        settings = self._state.settings
        moved = [item.name for item in failed.metrics if item.verdict == verdicts.REGRESSED]
        if not settings.predict or not moved:
            return []
        base = None
        if settings.against:
            root = self._state.config.rootpath
            base = self._state.broker.predict_at(load.spec, root, settings.against).sites
        return origins(moved, load.result.sites, base, settings.against or "")


class MemoryBaseline(_Gate):
    """Compares memory, loading work, manifest and numbers with the baseline in git: ``.check(llm)``."""

    fixture = "memory_baseline"
    sections = ("memory",)
    recorded = ("memory",)
    regressed = MemoryRegressed

    def _is_to_be_explained(self, baseline: Baseline | None) -> bool:
        settings = self._state.settings
        return (
            settings.recording
            and settings.record_allocations
            and baseline is not None
            and bool(baseline.memory)
            and not baseline.allocations
        )

    def _results(self, load: Load, count: int, metrics: Sequence[str] | None) -> list[LoadResult]:
        if self._state.settings.record_allocations:
            load.record_allocations()
        repeats = load.repeats(count - 1)
        for result in repeats:
            if not result.ok:
                raise self._state.broker.error(result)
        return [load.result, *repeats]


class LatencyBaseline(_Gate):
    """Compares load time, time to first token and per token, and work with the baseline in git: ``.check(llm)``.

    The load is timed in further processes until every time is judged, or ``--llm-latency-time`` is spent.
    """

    fixture = "latency_baseline"
    sections = ("time", "work")
    recorded = ("time", "work")
    regressed = LatencyRegressed

    def _compare(
        self,
        load: Load,
        baseline: Baseline | None,
        metrics: Sequence[str] | None,
        tolerances: Mapping[str, Tolerance],
        times: Mapping[str, RecordedTime] | None = None,
    ) -> list[Comparison]:
        if metrics is None or set(metrics) - {LOAD}:
            # The work also explains a changed time; the load's own work is counted with the memory.
            load.worked()
        comparisons: list[Comparison] = []

        def judge(times: Mapping[str, RecordedTime] | None) -> dict[str, str]:
            comparisons[:] = super(LatencyBaseline, self)._compare(load, baseline, metrics, tolerances, times)
            return _verdicts(comparisons)

        until_clear(load, self._state.settings.latency_time, judge)
        times_now = timings(load.timed_results)
        self._state.run(load.spec).times = {name: timing_entry(timing) for name, timing in times_now.items()}
        return comparisons

    def _results(self, load: Load, count: int, metrics: Sequence[str] | None) -> list[LoadResult]:
        return load.worked(count) if _has(load, metrics, "work") else [load.result]

    def _times(self, load: Load, metrics: Sequence[str] | None) -> Mapping[str, RecordedTime] | None:
        if not _has(load, metrics, "time"):
            return {}
        until = time.monotonic() + self._state.settings.latency_time
        # In turn, so that neither gets all of the time.
        for processes, loads in zip(LOOKS, LOADS, strict=True):
            results = load.timed(processes, loads, until)
        return timings(results)


def _has(load: Load, metrics: Sequence[str] | None, section: str) -> bool:
    """Return whether the chosen metrics, or all of them, include some of a section."""
    return metrics is None or any(section_of(name, load.result.table) == section for name in metrics)


def _other_names(state: State, spec: LoadSpec, digests: Mapping[str, str]) -> list[str]:
    """Return the other names under which the same model, loaded the same way, is recorded for this device."""
    found = []
    for entry in state.store.entries(state.device_key(spec)):
        if entry.slug == spec.slug and entry.model != spec.name:
            # A file that cannot be read is the business of the tests that own it.
            with contextlib.suppress(BaselineError):
                baseline = state.store.read(entry.path)
                if baseline is not None and {"shape": baseline.shape, "weights": baseline.weights} == digests:
                    found.append(entry.model)
    return found


def _verdicts(comparisons: Sequence[Comparison]) -> dict[str, str]:
    return {item.name: item.verdict for part in comparisons if part.section == "time" for item in part.metrics}


#: The fixture that checks each section.
_FIXTURES = {section: gate.fixture for gate in (MemoryBaseline, LatencyBaseline) for section in gate.sections}
