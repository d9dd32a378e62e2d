"""Add the loads' figures to reports of other tools; each integration is imported only if its tool makes a report."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

#: Integration -> function that tells whether its tool makes a report of this run. pytest-json-report and JUnit do not
#: need an integration: they read ``user_properties``.
PRESENT: dict[str, Callable[[pytest.Config], bool]] = {
    "github": lambda config: os.environ.get("GITHUB_ACTIONS") == "true" and not hasattr(config, "workerinput"),
    "html": lambda config: bool(config.getoption("htmlpath", None)),
    "allure": lambda config: bool(config.getoption("allure_report_dir", None)),
}


def register(config: pytest.Config) -> None:
    """Register the integrations of the tools that make a report of this run."""
    for name, is_present in PRESENT.items():
        if is_present(config):
            config.pluginmanager.import_plugin(f"pytest_llmload.integrations.{name}")
