"""Collection: parametrise tests by what they load, and report mistakes in markers."""

from __future__ import annotations

import unittest
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_llmload.core.canonical import digest
from pytest_llmload.host.checks import limits
from pytest_llmload.host.hooks.suite_loads import SuiteLoads, suite_loads
from pytest_llmload.host.markers import nearest
from pytest_llmload.host.markers.table import LIMIT_MARKERS, LOAD_MARKERS, markers
from pytest_llmload.host.run.stash import state_of
from pytest_llmload.host.run.state import State
from pytest_llmload.host.run.suite import SUITE
from pytest_llmload.host.settings import options


def suite_module(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Return a collector for the ready-made suite's modules, independent of the user's ``python_files``."""
    if file_path.parent != SUITE:
        return None
    patterns = parent.config.getini("python_files")
    if parent.session.isinitpath(file_path) or any(file_path.match(pattern) for pattern in patterns):
        return None  # pytest itself collects it
    module: pytest.Collector = pytest.Module.from_parent(parent, path=file_path)
    return module


def generate(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test by the loads that it requests. Mistakes are kept, and raised once collection is over."""
    state = state_of(metafunc.config)
    suite = _is_suite(metafunc.definition)
    if not state.models:
        reason = pytest.mark.skip(reason=f"no model to load: give {options.flag(metafunc.config, 'model')}=SPEC")
        _parametrise(metafunc, [pytest.param("", id="no-model", marks=reason)])
        return
    try:
        loads = suite_loads(state) if suite else SuiteLoads([], {})
        state.log.left_out |= loads.left_out
        variants = state.marks.variants(metafunc.definition, state.models, loads.fields)
    except pytest.UsageError as error:
        state.log.mistakes.append(str(error))
        _parametrise(metafunc, [pytest.param("", id="invalid")])
        return
    parameters = []
    uses: Counter[str] = Counter()
    for variant in variants:
        key = variant.id
        if state.specs.setdefault(key, variant.spec) != variant.spec:
            # Another load of the same name: checks that differ, or an id that the user chose twice.
            key = f"{variant.id}+{digest(variant.spec.to_json(), 6)}"
            state.specs[key] = variant.spec
        uses[key] += 1
        # One load under different marks.
        identity = key if uses[key] == 1 else f"{key}+{uses[key]}"
        parameters.append(pytest.param(key, id=identity, marks=variant.marks))
    _parametrise(metafunc, parameters)


def _is_suite(item: pytest.Item) -> bool:
    return any(mark.kwargs.get("suite") for mark in item.iter_markers("llmload"))


def refuse_suite_without_model(state: State, items: list[pytest.Item]) -> None:
    """Raise UsageError if a test of the ready-made suite is to run without a model; called after deselection."""
    if state.models or not any(map(_is_suite, items)):
        return
    flag = options.flag(state.config, "model")
    state.log.mistakes.append(f"the ready-made suite needs a model: {flag}=random:tiny-llama, or your own")
    _refuse(state, items)


def _parametrise(metafunc: pytest.Metafunc, parameters: list[Any]) -> None:
    metafunc.parametrize("llm_spec", parameters, indirect=True, scope="session")


def validate(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Raise UsageError for markers that are wrong or would be ignored, all of them at once.

    Called only in runs that have to do with loads: the markers' names are labels in other people's suites.
    """
    state = state_of(config)
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "llm_spec" in names and _is_unittest(item):
            state.log.mistakes.append(
                f"{item.nodeid}: a method of unittest.TestCase cannot use llm: it cannot be parametrised by its loads; "
                "write a function, or a method of a plain class"
            )
            continue
        try:
            if "llm_spec" in names or "llm_load" in names or "llm_gpus" in names:
                limits.validate(item)
                if "llm_spec" not in names:  # where it is no axis of variants
                    for mark in nearest.nearest(item, "gpu_count"):
                        state.marks.gpus(mark, item.nodeid)
                for mark in nearest.parameter_marks(item, LOAD_MARKERS):
                    state.log.mistakes.append(
                        f"{item.nodeid}: {mark.name} inside pytest.param(marks=…) of another parametrize would be "
                        f"ignored: parametrise by {mark.name} itself, as in {mark.name}(a, b)"
                    )
            state.log.mistakes += _ignored(state, item, names)
        except pytest.UsageError as error:
            state.log.mistakes.append(str(error))
    _refuse(state, items)


def _is_unittest(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and item.cls is not None and issubclass(item.cls, unittest.TestCase)


def _refuse(state: State, items: list[pytest.Item]) -> None:
    """Raise UsageError if there are mistakes.

    An xdist worker collects nothing instead: xdist does not survive a worker that raises, and the controller reports
    the mistakes once.
    """
    if state.is_worker and state.log.mistakes:
        items.clear()
    else:
        state.refuse_mistakes()


def _ignored(state: State, item: pytest.Item, names: Sequence[str]) -> list[str]:
    heeded: set[str] = set()
    hardware = {name for name, marker in markers().items() if marker.hardware}
    if "llm_spec" in names:
        heeded |= {*LOAD_MARKERS, *hardware}
    if "llm_load" in names or "llm_gpus" in names:
        heeded |= hardware
    if "llm" in names or "llm_load" in names:
        heeded |= LIMIT_MARKERS.keys()
    claims = {**dict.fromkeys(LOAD_MARKERS, state.marks.claims), **dict.fromkeys(LIMIT_MARKERS, limits.claims)}
    return [
        f"{item.nodeid}: {mark.name} would be ignored: the test uses no load fixture; let it request 'llm'"
        for mark in item.own_markers
        if mark.name in claims and mark.name not in heeded and claims[mark.name](mark)
    ]
