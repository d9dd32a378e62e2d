"""Keep a run's state in its stash; separate from the state itself, so that a run without loads imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llmload.host.run.state import State

_STATE = pytest.StashKey["State"]()


def state_of(config: pytest.Config) -> State:
    """Return the run's state, made at the first call. Raises UsageError if an option is wrong."""
    from pytest_llmload.host.run.state import State

    if _STATE not in config.stash:
        config.stash[_STATE] = State(config)
    return config.stash[_STATE]


def existing_state(config: pytest.Config) -> State | None:
    """Return the run's state, or None in a run that has nothing to do with loads."""
    return config.stash.get(_STATE, None)
