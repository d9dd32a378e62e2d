"""``llm_load``: loads that a test asks for in its body."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llmload.core import verdicts
from pytest_llmload.core.errors import MachineError, RequirementMissing
from pytest_llmload.host.checks import requirements
from pytest_llmload.host.loads.llm import LLM
from pytest_llmload.host.run.stash import state_of
from pytest_llmload.host.settings import options
from pytest_llmload.host.settings.models import parse_model

if TYPE_CHECKING:
    from pytest_llmload.host.loads.load import Load

#: The loads that a test asked for so far; its limits hold for each.
ASKED_FOR = pytest.StashKey["list[Load]"]()


class Factory:
    """Called with the keywords of the markers, and ``model=``, ``env=``, ``options=``.

    Loads at once. Raises the errors of a load; a load that this machine cannot do skips the test, or is an error under
    ``--llm-require-hardware``. ``shared=True`` uses the run's load of an equal spec, otherwise the load is the test's
    own and closed at its end.
    """

    def __init__(self, config: pytest.Config, item: pytest.Item) -> None:
        self._state = state_of(config)
        self._item = item
        self._own: list[Load] = []

    def __call__(self, model: str | None = None, *, shared: bool = False, **keywords: Any) -> LLM:
        __tracebackhide__ = True
        state = self._state
        if model is None and not state.models:
            pytest.skip(f"no model to load: give {options.flag(state.config, 'model')}=SPEC")
        where = f"{self._item.nodeid}: llm_load"
        try:
            layers = state.settings.layers
            chosen = state.models[0] if model is None else parse_model(model, state.config.rootpath, layers)
            spec = state.marks.spec(chosen, state.marks.from_keywords(where, **keywords), where)
        except ValueError as wrong:
            raise pytest.UsageError(f"{where}: {wrong}") from None
        except pytest.UsageError as wrong:
            # Raised here, so that the traceback ends at the test's line.
            raise pytest.UsageError(str(wrong)) from None
        state.log.has_load_tests = True
        if reason := requirements.missing(state, self._item, spec):
            state.skip(self._item, spec, reason)
        load = state.loads.of(spec) if shared else state.loads.private(spec)
        if not shared:
            self._own.append(load)
        try:
            result = load.result
        except RequirementMissing as lacks:
            state.skip(self._item, spec, str(lacks))
        except MachineError as broken:
            state.note(spec, self._item.nodeid, verdicts.ERROR, str(broken).splitlines()[0])
            raise
        state.note(spec, self._item.nodeid)
        state.run(spec).result = result
        self._item.stash.setdefault(ASKED_FOR, []).append(load)
        if (error := load.error) is not None:
            raise error
        return LLM(load)

    def close(self) -> None:
        """Close the loads that only this test used, also if closing one of them raises."""
        with contextlib.ExitStack() as stack:
            for load in self._own:
                stack.callback(load.close)
