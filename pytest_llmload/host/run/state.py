"""One pytest run's state: made when the first test that uses a load is collected, kept in ``config.stash``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_llmload.core import verdicts
from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import MachineError
from pytest_llmload.core.job import Device
from pytest_llmload.core.verdicts import Run, Subject
from pytest_llmload.host.loads import hardware
from pytest_llmload.host.loads.broker import ENDPOINT, Broker
from pytest_llmload.host.loads.strategies import Strategies
from pytest_llmload.host.markers.variants import Marks
from pytest_llmload.host.settings import options
from pytest_llmload.host.settings.models import Model, parse_model
from pytest_llmload.host.settings.probes import OwnProbes

if TYPE_CHECKING:
    from pytest_llmload.baselines.store import Store
    from pytest_llmload.core.results import LoadResult
    from pytest_llmload.core.spec import LoadSpec
    from pytest_llmload.host.loads.load import Load

#: Why a test was skipped for its load.
SKIP_REASON = pytest.StashKey[str]()

#: Folder of the ready-made suite.
SUITE = Path(__file__).resolve().parents[2] / "suite"


class State:
    """Everything that the hooks and fixtures of one run share."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.probes = OwnProbes(config)
        self.settings = options.resolve(config, self.probes.table)
        self.strategies = Strategies(config)
        self.marks = Marks(self.settings, self.strategies)
        #: Name of each model -> how it was given.
        self._model_texts: dict[str, str] = {}
        self.models = self._models()
        #: What a test is parametrised with -> what to load; plain strings, so that other plugins can print them.
        self.specs: dict[str, LoadSpec] = {}
        #: Load -> nodeids of its users that have not finished yet.
        self.pending: dict[LoadSpec, set[str]] = {}
        #: What happened to each load, for the reports.
        self.runs: dict[LoadSpec, Run] = {}
        #: What is wrong with markers, found while tests were parametrised and raised once collection is over.
        self.mistakes: list[str] = []
        #: Whether any test that uses a load was to run, and the baselines that the collected tests own.
        self.wanted = False
        self.owned: set[Path] = set()
        #: Whether all tests were collected, and whether some were left out of that, by whomever.
        self.collected = False
        self.tests_left_out = False
        #: Whether tests of the ready-made suite are to run.
        self.suite_collected = False
        #: Strategies that the ready-made suite leaves out on this device, and why.
        self.left_out: dict[str, str] = {}
        #: Nodeids of verdicts about the run as a whole.
        self.session_errors: set[str] = set()
        self.stale: list[Path] = []
        self.is_worker = hasattr(config, "workerinput")
        self.broker = Broker(
            self.settings,
            self.strategies,
            self.probes,
            lambda: self.device,
            lambda result: config.hook.pytest_llmload_load_finished(config=config, result=result),
            self.describe,
            config.rootpath,
        )

    def refuse_mistakes(self) -> None:
        """Raise UsageError for all that is wrong with markers, each mistake once."""
        if self.mistakes:
            raise pytest.UsageError("\n".join(dict.fromkeys(self.mistakes)))

    def _models(self) -> list[Model]:
        models: dict[str, Model] = {}
        for text in self.settings.models:
            try:
                model = parse_model(text, self.settings.models_base)
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
        try:
            device = hardware.detect(self.settings.device)
        except MachineError as error:
            return error
        key = self.config.hook.pytest_llmload_device_key(config=self.config, device=device)
        return dataclasses.replace(device, key=key) if key else device

    @property
    def device(self) -> Device:
        """Where this run's loads go. Raises MachineError where GPU and torch build do not fit."""
        if isinstance(self._device, MachineError):
            raise self._device
        return self._device

    @cached_property
    def store(self) -> Store:
        from pytest_llmload.baselines.store import Store

        try:
            return Store(self.settings.baselines, self.settings.baseline_variant)
        except ValueError as error:
            raise pytest.UsageError(f"{options.flag(self.config, 'baseline-variant')}: {error}") from None

    def suite_defaults(self) -> list[dict[str, Any]]:
        """What the ready-made suite loads: the strategies that need no further input and fit this device, or those of
        --llm-strategy; ``left_out`` then says which are not among them, and why.

        Raises UsageError for an unknown name.
        """
        names = self.settings.strategies
        if unknown := [name for name in names if name not in self.strategies]:
            known = ", ".join(self.strategies)
            raise pytest.UsageError(f"{options.flag(self.config, 'strategy')}: unknown {unknown[0]!r}: one of {known}")
        found: list[dict[str, Any]] = []
        for name in names or self.strategies:
            declaration = self.strategies[name]
            asked = declaration.takes_endpoint and self.settings.endpoint is not None
            if not names and not asked and (reason := self._why_not(declaration)):
                self.left_out[name] = reason
                continue
            if declaration.own_code:
                if self.settings.loader is not None:
                    found.append({**declaration.fields, "target": self.settings.loader})
                elif names:
                    raise pytest.UsageError(f"strategy {name!r} needs {options.flag(self.config, 'loader')}")
                else:
                    self.left_out[name] = f"only with {options.flag(self.config, 'loader')}"
                continue
            found += [dict(fields) for fields in (declaration.fields, *declaration.also)]
        return found

    def _why_not(self, declaration: Any) -> str:
        try:
            return str(declaration.why_not_by_default(self.device))
        except MachineError as error:
            return str(error)

    def fingerprint(self, spec: LoadSpec) -> str:
        """A few digits that tell two specs with one slug apart."""
        return digest(spec.to_json(), 6)

    def expect(self, items: Sequence[pytest.Item]) -> None:
        """Take note of the tests that will run: which loads they need, and which baselines they own."""
        for item in items:
            spec = self.spec_of(item)
            if spec is None:
                continue
            self.suite_collected |= any(mark.kwargs.get("suite") for mark in item.iter_markers("llmload"))
            if self.load_of(item) is not None:
                self.wanted = True
                self.pending.setdefault(spec, set()).add(item.nodeid)
            if "latency_baseline" in item.fixturenames or item.get_closest_marker("latency_budget"):  # type: ignore[attr-defined]
                self.broker.load(spec).times_wanted = True
            if {"memory_baseline", "latency_baseline"} & set(item.fixturenames):  # type: ignore[attr-defined]
                with contextlib.suppress(MachineError):
                    self.owned.add(self.baseline_path(spec))
        self.broker.expected = list(self.pending)

    def finished(self, item: pytest.Item) -> None:
        """A test is over: close its load after the last one, and do not hand on what the test changed."""
        spec = self.spec_of(item)
        if spec is None or spec not in self.pending:
            return
        users = self.pending[spec]
        users.discard(item.nodeid)
        load = self.broker.load(spec)
        load.after_test()
        if not users:
            load.close()

    def device_key(self, spec: LoadSpec) -> str:
        """The device's folder of a load's baselines; ``-xN`` where it spans GPUs, ``endpoint`` if it runs elsewhere."""
        if self.broker.runs_already(spec):
            return ENDPOINT
        gpus = self.broker.gpus_needed(spec)
        return f"{self.device.key}-x{gpus}" if gpus > 1 and self.device.kind == "cuda" else self.device.key

    def baseline_path(self, spec: LoadSpec) -> Path:
        return self.store.path_for(spec.name, self.device_key(spec), spec.slug)

    def subject(self, spec: LoadSpec) -> Subject:
        return Subject(spec.name, spec.slug, self.device_key(spec))

    def stale_baselines(self) -> list[Path]:
        """Baselines of this run's models on its device that no test owns; none where tests were left out."""
        from pytest_llmload.host.run import partial_runs

        if not self.collected or self.tests_left_out:
            return []
        try:
            key = self.device.key
        except MachineError:
            return []
        models = {model.name for model in self.models}
        # What an endpoint serves can be loaded anew only where the run names one.
        here = {ENDPOINT} if self.settings.endpoint else set()
        here |= {key, *(f"{key}-x{count}" for count in range(2, len(self.device.gpus) + 1))}
        found = [
            entry.path
            for entry in self.store.entries()
            if entry.model in models
            and entry.device in here
            and entry.path not in self.owned
            and not self._comes_by_an_option(entry.path)
        ]
        return [] if found and partial_runs.narrowed(self.config) else found

    def _comes_by_an_option(self, path: Path) -> bool:
        """Whether a baseline may be of a load that this run's options left out: one of the ready-made suite, or of a
        strategy that the suite loads only where it is asked to.
        """
        from pytest_llmload.core.errors import BaselineError

        try:
            baseline = self.store.read(path)
        except BaselineError:
            return False
        if baseline is None:
            return False
        used = {baseline.spec.get(name) for name in ("strategy", "dtype", "quant")}
        return (baseline.suite and not self.suite_collected) or bool(used & self.left_out.keys())

    def display(self, path: Path) -> str:
        """A path as people write it: relative to the root directory where it is inside."""
        root = self.config.rootpath
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    def command(self, item: pytest.Item, spec: LoadSpec) -> str:
        """What to type, where this run was started, to record or accept what a test loads.

        The one test, this run's own options with the one model, and the update flag.
        """
        import os
        import shlex

        _, separator, name = item.nodeid.partition("::")
        if item.path.parent == SUITE:
            test = ["--pyargs", f"pytest_llmload.suite.{item.path.stem}{separator}{name}"]
        else:
            test = [f"{os.path.relpath(item.path, self.config.invocation_params.dir)}{separator}{name}"]
        without = ["update-baselines", "record-missing", "strict", "report"]
        model = []
        # Models of the ini file stay where they are.
        text = next((text for name, text in self._model_texts.items() if name == spec.name), None)
        if text is not None and self.config.getoption(options.dest("model")):
            without.append("model")
            model = [f"{options.flag(self.config, 'model')}={text}"]
        kept = options.given_arguments(self.config, without=tuple(without))
        flag = options.flag(self.config, "update-baselines")
        return shlex.join(["pytest", *test, *model, *kept, flag])

    def run(self, spec: LoadSpec) -> Run:
        """The report entry of a load."""
        if spec not in self.runs:
            try:
                key = self.device_key(spec)
            except MachineError:
                key = ""
            self.runs[spec] = Run(spec=spec, device_key=key)
        return self.runs[spec]

    def skip(self, item: pytest.Item, spec: LoadSpec | None, reason: str) -> NoReturn:
        """Skip a test whose load cannot run here. Raises MachineError where skipping was ruled out."""
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
        """Write a test's use of a load, and what came of it, into the report."""
        run = self.run(spec)
        if nodeid not in run.nodeids:
            run.nodeids.append(nodeid)
        severity = verdicts.SEVERITY
        first = len(run.nodeids) == 1 and not run.messages
        if first or severity.index(outcome) > severity.index(run.outcome):
            run.outcome = outcome
        if message and message not in run.messages:
            run.messages.append(message)

    def describe(self, result: LoadResult) -> str:
        """The text that a load which is no loaded model fails with."""
        from pytest_llmload.core.spec import LoadSpec
        from pytest_llmload.reports.failure import load_failure_text

        return load_failure_text(self.subject(LoadSpec.from_json(result.spec)), result)

    def spec_of(self, item: pytest.Item) -> LoadSpec | None:
        """What a test loads; None for a test that is not parametrised by us."""
        callspec = getattr(item, "callspec", None)
        return self.specs.get(callspec.params.get("llm_spec", "")) if callspec is not None else None

    def loaded_by(self, item: pytest.Item) -> LoadSpec | None:
        """The spec of a test that loads it; None where it only asks what it would load."""
        spec = self.spec_of(item)
        return spec if spec in self.runs or "llm" in getattr(item, "fixturenames", ()) else None

    def load_of(self, item: pytest.Item) -> Load | None:
        """The load of a test that uses one."""
        spec = self.spec_of(item)
        uses = spec is not None and "llm" in getattr(item, "fixturenames", ())
        return self.broker.load(spec) if spec is not None and uses else None
