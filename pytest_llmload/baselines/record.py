"""Turn the loads of a recording run into the baseline that is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pytest_llmload.baselines import numbers
from pytest_llmload.baselines.compare import compare
from pytest_llmload.baselines.entries import measured, selection
from pytest_llmload.baselines.environment import concerning, differing, entry, stored
from pytest_llmload.baselines.model import Baseline, RecordedTime, compact, has_numbers, significant
from pytest_llmload.baselines.repeats import agree
from pytest_llmload.baselines.statistics import PROCESSES
from pytest_llmload.baselines.timings import timings
from pytest_llmload.core.environment_entries import HOST
from pytest_llmload.core.metrics import MANIFEST, NUMBERS, Metric, find, section_of
from pytest_llmload.core.portable import portable_spec
from pytest_llmload.core.results import AllocationSite, LoadResult, Numbers
from pytest_llmload.core.spec import LoadSpec
from pytest_llmload.core.units import Tolerance
from pytest_llmload.core.verdicts import (
    INCOMPARABLE,
    INCONCLUSIVE,
    MISSING,
    OK,
    UNAVAILABLE,
    Comparison,
    MetricVerdict,
)

SECTIONS = ("memory", "work", "time")


@dataclass(frozen=True)
class Recording:
    """The baseline to store, and what to report about it."""

    #: The new content; the old object itself if nothing changes or something was refused.
    baseline: Baseline | None
    #: Reasons why nothing may be stored, one sentence each.
    refusals: tuple[str, ...] = ()
    #: Entries that replace older ones: ``gpu.settled``, ``manifest`` …
    accepted: tuple[str, ...] = ()
    #: New entries.
    recorded: tuple[str, ...] = ()
    #: Entries that could not be kept, each with the reason.
    dropped: tuple[str, ...] = ()


def record(
    existing: Baseline | None,
    results: Sequence[LoadResult],
    *,
    update: bool,
    sections: Sequence[str] = SECTIONS,
    metrics: Sequence[str] | None = None,
    tolerances: Mapping[str, Tolerance] | None = None,
    times: Mapping[str, RecordedTime] | None = None,
    suite: bool = False,
) -> Recording:
    """Return the baseline after ``--llm-update-baselines`` (``update``) or ``--llm-record-missing``.

    ``results`` are all repeats of one load; each entry is judged as :func:`compare` judges it, with the same
    ``metrics`` and ``tolerances``. Update writes the entries that are not ok, record-missing those that the baseline
    lacks. Informative figures alone never cause an update; they are written along with others. ``times`` are those of
    processes that were started to be timed; without them, the repeats' times are used. ``suite``: the installed suite
    records. Raises ValueError for loads that did not work, are not of one spec, or have times but no host.
    """
    load, refusals = agree(results)
    if refusals:
        return Recording(existing, refusals=tuple(refusals))
    if times is None:
        times = timings(results)
    chosen = {section: _of_section(metrics, section, load.table) for section in sections}
    comparisons = [
        compare(existing, load, section=section, metrics=names, tolerances=tolerances, times=times)
        for section, names in chosen.items()
    ]
    old = existing
    if any(item.whole and item.verdict == INCOMPARABLE for item in comparisons):
        if not update:
            return Recording(existing)
        # Figures of a different shape, spec or workload cannot stay next to the new ones.
        old = None
    draft = _Draft(old, load, times, suite=suite or (existing is not None and existing.suite))
    for comparison in comparisons:
        _fill(draft, comparison, chosen[comparison.section], update=update)
    draft.settle_environment()
    accepted, recorded = tuple(draft.accepted), tuple(draft.recorded)
    if existing is not None and old is None:
        accepted, recorded = (*accepted, *recorded), ()
    new = draft.baseline()
    explained = existing is not None and new.allocations != existing.allocations
    changed = accepted or recorded or draft.dropped or explained
    return Recording(new if changed else existing, (), accepted, recorded, tuple(draft.dropped))


def _of_section(metrics: Sequence[str] | None, section: str, table: Mapping[str, Metric]) -> list[str] | None:
    if metrics is None:
        return None
    return [name for name in metrics if section_of(name, table) == section]


def _fill(draft: _Draft, comparison: Comparison, metrics: Sequence[str] | None, *, update: bool) -> None:
    if comparison.whole:
        for name in filter(selection(metrics, comparison.section, draft.table), draft.measured(comparison.section)):
            draft.write(comparison.section, name)
        return
    items = comparison.metrics
    wanted = [item for item in items if not item.informative and _wanted(item, draft, comparison.section, update)]
    if wanted or not update:
        wanted += [item for item in items if item.informative and _wanted(item, draft, comparison.section, update)]
    for item in wanted:
        draft.write(comparison.section, item.name)


def _wanted(item: MetricVerdict, draft: _Draft, section: str, update: bool) -> bool:
    if item.verdict in (OK, UNAVAILABLE):
        return False
    if not update:
        return item.verdict == MISSING or (section == "time" and not draft.has_time(item.name))
    if item.verdict == INCONCLUSIVE and item.baseline is not None and item.current is not None:
        # Timings differ in every run: writing a change within the declared band would only make diffs, unless the
        # recorded samples are too few to ever be judged.
        return draft.has_too_few(item.name) or not item.tolerance.allows(item.baseline, item.current)
    return True


class _Draft:
    """A baseline that is being recorded."""

    def __init__(
        self, old: Baseline | None, load: LoadResult, times: Mapping[str, RecordedTime], *, suite: bool
    ) -> None:
        spec = LoadSpec.from_json(load.spec)
        self._load = load
        self.table = load.table
        self._suite = suite
        self._times = times
        self._host = entry(load.environment, HOST)
        self._old = old or Baseline(
            shape=load.digests["shape"],
            weights=load.digests["weights"],
            spec=portable_spec(spec.identity()),
            workload=str(spec.workload),
        )
        self._figures = {section: dict(self._old.figures(section)) for section in ("memory", "work")}
        self._time = {host: dict(timings) for host, timings in self._old.time.items()}
        self._numbers, self._weights = self._old.numbers, self._old.weights
        self._manifest, self._settings = self._old.manifest, dict(self._old.settings)
        self._environment = dict(self._old.environment)
        #: Names of written entries that belong to the file's environment; times have their own.
        self._written: set[str] = set()
        self.accepted: list[str] = []
        self.recorded: list[str] = []
        self.dropped: list[str] = []

    def measured(self, section: str) -> list[str]:
        """Return the names of all entries that the load has for a section."""
        return measured(self._load, section, self._times)

    def has_time(self, name: str) -> bool:
        return name in self._time.get(self._host, {})

    def has_too_few(self, name: str) -> bool:
        """Return whether the old times are of too few processes for a judgement, and the new times of enough."""
        return len(self._time[self._host][name].samples) < PROCESSES <= len(self._times[name].samples)

    def write(self, section: str, name: str) -> None:
        """Take one entry from the load."""
        if section == "time":
            if HOST not in self._load.environment:
                raise ValueError(f"{name} cannot be recorded: the load's result does not name its kind of host")
            recorded = self._time.setdefault(self._host, {})
            self._log(name, name in recorded)
            recorded[name] = self._times[name]
            return
        self._written.add(name)
        if name == MANIFEST:
            self._log(name, bool(self._manifest))
            self._manifest, self._settings = tuple(self._load.manifest), dict(self._load.settings)
        elif name == NUMBERS:
            self._log(name, has_numbers(self._numbers))
            self._numbers, self._weights = compact(self._load.numbers), self._load.digests["weights"]
        else:
            self._log(name, name in self._figures[section])
            value = self._load.metrics[name]
            self._figures[section][name] = int(value) if value == int(value) else significant(value)

    def _log(self, name: str, existed: bool) -> None:
        (self.accepted if existed else self.recorded).append(name)

    def settle_environment(self) -> None:
        """Set the file's environment to that in which the written entries were measured.

        An entry of the environment on which only kept figures depend stays unchanged. If both a written and a kept
        figure depend on it, the kept figure is dropped, since it was never measured in the new environment.
        """
        if not self._written:
            return
        old, new = self._old.environment, stored(self._load.environment)
        kept = {
            name: depends
            for name, depends in ((name, self._depends(name)) for name in self._entries())
            if name not in self._written and depends
        }
        for key in sorted({*old, *new}):
            concerned = [name for name, depends in kept.items() if self._differs(key, depends, old, new)]
            if concerned and not any(self._differs(key, self._depends(name), old, new) for name in self._written):
                continue
            for name in concerned:
                self._drop(name, differing(old, new, kept.pop(name)))
            if key in new:
                self._environment[key] = new[key]
            else:
                self._environment.pop(key, None)

    def _entries(self) -> list[str]:
        numbers = [NUMBERS] if has_numbers(self._numbers) else []
        return [*self._figures["memory"], *self._figures["work"], *numbers]

    def _depends(self, name: str) -> tuple[str, ...]:
        if name == NUMBERS:
            return numbers.DEPENDS
        metric = find(name, self.table)
        return metric.depends if metric else ()

    @staticmethod
    def _differs(key: str, depends: tuple[str, ...], old: Mapping[str, str], new: Mapping[str, str]) -> bool:
        return bool(differing(old, new, concerning(key, depends)))

    def _drop(self, name: str, why: str) -> None:
        if name == NUMBERS:
            self._numbers = Numbers()
        for figures in self._figures.values():
            figures.pop(name, None)
        self.dropped.append(f"{name}: recorded in a different environment and not measured now ({why})")

    def _allocations(self) -> tuple[AllocationSite, ...]:
        """Return the sites of the load that the memory figures are of, as far as they are known."""
        memory = self._figures["memory"]
        if self._load.allocations and (not self._old.allocations or any(name in memory for name in self._written)):
            return tuple(dataclasses.replace(each, baseline=None) for each in self._load.allocations)
        return () if any(name in memory for name in self.accepted) else self._old.allocations

    def baseline(self) -> Baseline:
        return dataclasses.replace(
            self._old,
            weights=self._weights,
            memory=self._figures["memory"],
            work=self._figures["work"],
            time=self._time,
            numbers=self._numbers,
            manifest=self._manifest,
            settings=self._settings,
            allocations=self._allocations(),
            environment=self._environment,
            suite=self._suite,
        )
