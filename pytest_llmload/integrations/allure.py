"""Allure: attach the figures of its load to each test.

https://allurereport.org/docs/pytest-reference/
"""

from __future__ import annotations

from collections.abc import Generator

import allure
import pytest

from pytest_llmload.host.run.stash import existing_state
from pytest_llmload.reports.figure_list import rows


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Attach the figures of the test's load, also if the test fails.

    https://docs.pytest.org/en/stable/reference/reference.html#pytest.hookspec.pytest_runtest_call
    """
    try:
        return (yield)
    finally:
        state = existing_state(item.config)
        spec = state.loaded_by(item) if state is not None else None
        if state is not None and spec is not None and spec in state.log.runs:
            found = rows(state.run(spec))
            width = max(len(name) for name, _ in found)
            text = "\n".join(f"{name:<{width}}  {value}" for name, value in found)
            allure.attach(text, name="llmload", attachment_type=allure.attachment_type.TEXT)
