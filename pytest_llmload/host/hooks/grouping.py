"""Keep the tests of one load together, after every other plugin has ordered them."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from pytest_llmload.host.run.stash import existing_state

#: Plugins that sort tests by a marker on purpose, and that marker: their order wins.
_SORTING = {"pytest_order": "order", "pytest_ordering": "run"}


class Grouping:
    """Registered late, so that its ordering comes after every other plugin's."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None, None, None]:
        """Move the tests of one load together, unless another plugin sorts tests on purpose.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_collection_modifyitems
        """
        collected = len(items)
        yield
        state = existing_state(self._config)
        if state is None:
            return
        from pytest_llmload.host.hooks import collecting

        collecting.refuse_suite_without_model(state, items)
        state.log.collected = True
        state.log.tests_left_out |= len(items) < collected
        state.sorted_by = _sorted_by(self._config, items)
        if state.sorted_by:
            return
        groups: dict[object, list[pytest.Item]] = {}
        for item in items:
            # A test without a load is a group of its own and stays where it is.
            groups.setdefault(state.spec_of(item) or id(item), []).append(item)
        items[:] = [item for group in groups.values() for item in group]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note, in their order, the loads that the tests will ask for.

        https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_collection_finish
        """
        state = existing_state(self._config)
        if state is not None:
            state.expect(session.items)


def _sorted_by(config: pytest.Config, items: list[pytest.Item]) -> str:
    """Return the marker by which another plugin sorts some of these tests; empty if none does."""
    present = (marker for plugin, marker in _SORTING.items() if config.pluginmanager.hasplugin(plugin))
    return next((marker for marker in present if any(item.get_closest_marker(marker) for item in items)), "")
