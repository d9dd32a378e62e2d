"""Where a run's state is kept; apart from the state itself, so that a run without loads imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llmload.host.run.state import State

STATE = pytest.StashKey["State"]()


def existing_state(config: pytest.Config) -> State | None:
    """The run's state, or None in a run that has nothing to do with loads."""
    return config.stash.get(STATE, None)
