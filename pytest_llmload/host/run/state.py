"""One pytest run's state: made when the first test that uses a load is collected, kept in ``config.stash``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from pytest_llmload.core import verdicts
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Device
from pytest_llmload.core.runs import Run, Subject
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.broker import Broker
from pytest_llmload.host.loads.jobs import ENDPOINT
from pytest_llmload.host.loads.shared_loads import SharedLoads
from pytest_llmload.host.loads.strategies import Strategies
from pytest_llmload.host.markers.variants import Marks
from pytest_llmload.host.run.accept_command import accept_command
from pytest_llmload.host.run.log import RunLog, note
from pytest_llmload.host.run.progress import display_of
from pytest_llmload.host.settings import options
from pytest_llmload.host.settings.models import Model, parse_model
from pytest_llmload.host.settings.probes import OwnProbes
from pytest_llmload.host.settings.settings import resolve
from pytest_llmload.prediction.devices import predicted_device

if TYPE_CHECKING:
    from pytest_llmload.baselines.store import Store
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.load import Load

#: Why a test was skipped for its load.
SKIP_REASON = pytest.StashKey[str]()


class State:
    """Everything that the hooks and fixtures of one run share."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.probes = OwnProbes(config)
        self.settings = resolve(config, self.probes.table)
        self.strategies = Strategies(config)
        self.marks = Marks(self.settings, self.strategies)
        #: Name of each model -> the model as an option names it.
        self._model_texts: dict[str, str] = {}
        self.models = self._models()
        #: The value that a test is parametrised with -> its load; plain strings, so that other plugins can print them.
        self.specs: dict[str, LoadSpec] = {}
        #: Load -> nodeids of its users that have not finished yet.
        self.pending: dict[LoadSpec, set[str]] = {}
        self.log = RunLog()
        #: The marker by which another plugin sorts the tests, so that those of one load stay where they are; or empty.
        self.sorted_by = ""
        #: Nodeids of verdicts about the run as a whole.
        self.session_errors: set[str] = set()
        self.stale: list[Path] = []
        #: Report -> the moment of ``time.monotonic`` from which it is written again while the run goes on.
        self.report_due: dict[Path, float] = {}
        #: The moment of ``time.monotonic`` at which --llm-budget is spent; None before the first load.
        self.budget_ends: float | None = None
        self.is_worker = hasattr(config, "workerinput")
        self.broker = Broker(
            self.settings,
            self.strategies,
            self.probes,
            lambda: self.device,
            lambda result: config.hook.pytest_llmload_load_finished(config=config, result=result),
            self.describe,
            config.rootpath,
            cache(partial(display_of, config)),
        )
        self.loads = SharedLoads(self.broker)

    def refuse_mistakes(self) -> None:
        """Raise UsageError for all mistakes in markers, each mistake once."""
        if self.log.mistakes:
            raise pytest.UsageError("\n".join(dict.fromkeys(self.log.mistakes)))

    def _models(self) -> list[Model]:
        models: dict[str, Model] = {}
        for text in self.settings.models:
            try:
                model = parse_model(text, self.settings.models_base, self.settings.layers)
            except ValueError as error:
                raise pytest.UsageError(f"{options.flag(self.config, 'model')}: {error}") from None
            self._model_texts.setdefault(model.name, text)
            if models.setdefault(model.name, model) != model:
                raise pytest.UsageError(
                    f"{options.flag(self.config, 'model')}: {models[model.name].spec!r} and {model.spec!r} are both "
                    f"called {model.name!r}: name one of them, as in other={model.spec}"
                )
        return list(models.values())

    @cached_property
    def _device(self) -> Device | MachineError:
        if self.settings.predict:
            return predicted_device(self.settings.predict)
        try:
            device = hardware.detect(self.settings.device)
        except MachineError as error:
            return error
        key = self.config.hook.pytest_llmload_device_key(config=self.config, device=device)
        return dataclasses.replace(device, key=key) if key else device

    @property
    def device(self) -> Device:
        """Return the device of this run's loads. Raises MachineError if the GPU and the build of torch do not fit."""
        if isinstance(self._device, MachineError):
            raise self._device
        return self._device

    @cached_property
    def store(self) -> Store:
        """Return the baselines of this run. Raises UsageError for a variant that cannot be a folder."""
        from pytest_llmload.baselines.store import Store

        try:
            return Store(self.settings.baselines, self.settings.baseline_variant)
        except ValueError as error:
            raise pytest.UsageError(f"{options.flag(self.config, 'baseline-variant')}: {error}") from None

    def expect(self, items: Sequence[pytest.Item]) -> None:
        """Register the tests that will run: which loads they need, and which baselines they use."""
        repeats: dict[LoadSpec, int] = {}
        for item in items:
            if "llm_load" in getattr(item, "fixturenames", ()):
                self.broker.expected.asking.add(item.nodeid)
            spec = self.spec_of(item)
            if spec is None:
                continue
            self.log.suite_collected |= any(mark.kwargs.get("suite") for mark in item.iter_markers("llmload"))
            if self.load_of(item) is not None:
                self.log.has_load_tests = True
                self.pending.setdefault(spec, set()).add(item.nodeid)
            if "latency_baseline" in item.fixturenames or item.get_closest_marker("latency_budget"):  # type: ignore[attr-defined]
                self.loads.of(spec).times_wanted = True
            if {"memory_baseline", "latency_baseline"} & set(item.fixturenames):  # type: ignore[attr-defined]
                with contextlib.suppress(MachineError):
                    path = self.baseline_path(spec)
                    self.log.used_baselines.add(path)
                    if self.settings.recording and (self.settings.update_baselines or not path.exists()):
                        repeats[spec] = self.settings.record_repeats
        self.broker.expected.specs = [spec for spec in self.pending for _ in range(repeats.get(spec, 1))]

    def finished(self, item: pytest.Item) -> None:
        """Close the load of a test that has ended, if it was its last user, or if the test changed the model."""
        self.broker.expected.test_ended(item.nodeid)
        spec = self.spec_of(item)
        if spec is None or spec not in self.pending:
            return
        users = self.pending[spec]
        users.discard(item.nodeid)
        load = self.loads.of(spec)
        load.after_test()
        if not users:
            load.close()

    def device_key(self, spec: LoadSpec) -> str:
        """Return the device's folder of a load's baselines: ``-xN`` if it spans GPUs, ``endpoint`` if it runs there."""
        if self.broker.runs_already(spec):
            return ENDPOINT
        gpus = self.broker.gpus_needed(spec)
        return f"{self.device.key}-x{gpus}" if gpus > 1 and self.device.kind == "cuda" else self.device.key

    def baseline_path(self, spec: LoadSpec) -> Path:
        """Return the path of a load's baseline, whether or not it exists."""
        return self.store.path_for(spec.name, self.device_key(spec), spec.slug)

    def subject(self, spec: LoadSpec) -> Subject:
        """Return what messages call a load: its model, variant and device."""
        key = self.device_key(spec)
        return Subject(spec.name, spec.slug, f"{key} (predicted)" if self.settings.predict else key)

    def display(self, path: Path) -> str:
        """Return a path as text, relative to the root directory if it is inside."""
        root = self.config.rootpath
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    def command(self, item: pytest.Item, spec: LoadSpec) -> str:
        """Return the command that records or accepts what a test loads."""
        return accept_command(item, self._model_texts.get(spec.name))

    def run(self, spec: LoadSpec) -> Run:
        """Return the report entry of a load."""
        try:
            key = self.subject(spec).device
        except MachineError:
            key = ""
        return self.log.run(spec, key)

    def skip(self, item: pytest.Item, spec: LoadSpec | None, reason: str) -> NoReturn:
        """Skip a test whose load cannot run here. Raises MachineError if this run must not skip."""
        __tracebackhide__ = True
        outcome = verdicts.SKIP
        if self.settings.require_hardware:
            name = "strict" if self.settings.strict else "require-hardware"
            reason = f"{reason}, and {options.flag(self.config, name)} makes that an error"
            outcome = verdicts.ERROR
        if spec is not None:
            self.note(spec, item.nodeid, outcome, reason)
        if outcome == verdicts.ERROR:
            raise MachineError(reason)
        item.stash[SKIP_REASON] = reason
        pytest.skip(reason)

    def note(self, spec: LoadSpec, nodeid: str, outcome: str = verdicts.PASS, message: str = "") -> None:
        """Add a test's use of a load, and its outcome, to the report."""
        note(self.run(spec), nodeid, outcome, message)

    def describe(self, result: LoadResult) -> str:
        """Return the failure text of a load that did not end in the requested model."""
        from pytest_llmload.core.spec import LoadSpec
        from pytest_llmload.reports.failure import load_failure_text

        return load_failure_text(self.subject(LoadSpec.from_json(result.spec)), result)

    def spec_of(self, item: pytest.Item) -> LoadSpec | None:
        """Return the spec of the load that a test is parametrised with; None for a test without one."""
        callspec = getattr(item, "callspec", None)
        return self.specs.get(callspec.params.get("llm_spec", "")) if callspec is not None else None

    def loaded_by(self, item: pytest.Item) -> LoadSpec | None:
        """Return the spec of a test that loads it; None if the test only requests the spec."""
        spec = self.spec_of(item)
        return spec if spec in self.log.runs or "llm" in getattr(item, "fixturenames", ()) else None

    def load_of(self, item: pytest.Item) -> Load | None:
        """Return the load of a test; None if the test uses none."""
        spec = self.spec_of(item)
        uses = spec is not None and "llm" in getattr(item, "fixturenames", ())
        return self.loads.of(spec) if spec is not None and uses else None
