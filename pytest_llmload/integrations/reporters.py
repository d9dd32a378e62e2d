"""Reports of other tools that get our figures: each integration is imported only where its tool reports."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

#: Integration -> whether its tool makes a report of this run. pytest-json-report and JUnit need none: they read
#: ``user_properties``.
PRESENT: dict[str, Callable[[pytest.Config], bool]] = {
    "github": lambda config: os.environ.get("GITHUB_ACTIONS") == "true" and not hasattr(config, "workerinput"),
    "html": lambda config: bool(config.getoption("htmlpath", None)),
    "allure": lambda config: bool(config.getoption("allure_report_dir", None)),
}


def register(config: pytest.Config) -> None:
    """Register the integrations of the tools that report."""
    for name, is_present in PRESENT.items():
        if is_present(config):
            config.pluginmanager.import_plugin(f"pytest_llmload.integrations.{name}")
