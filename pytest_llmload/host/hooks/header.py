"""The lines of pytest's header."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_llmload.host.settings import options

if TYPE_CHECKING:
    from pytest_llmload.host.run.state import State


#: Files that the header names.
_NAMES = 3


def missing_baselines(state: State) -> list[str]:
    """Return the line that says, before anything is loaded, which tests cannot pass since a baseline is missing."""
    from pytest_llmload.core.units import counted, plural
    from pytest_llmload.reports.layout import joined

    settings = state.settings
    missing = sorted(path for path in state.log.used_baselines if not path.exists())
    if not missing or settings.update_baselines or settings.record_missing or settings.inline:
        return []
    names = joined([state.display(path) for path in missing], _NAMES)
    record = options.flag(state.config, "record-missing")
    used = len(state.log.used_baselines)
    return [
        f"llmload: {len(missing)} of {counted(used, 'baseline')} {plural(len(missing), 'is', 'are')} missing, "
        f"{plural(len(missing), 'its tests', 'their tests')} will fail: {names}",
        f"         {record} writes them in this run; llmload accept writes them from its JSON report",
    ]


def order(state: State) -> list[str]:
    """Return the line that says that tests of one load are not moved together, and why."""
    if not state.sorted_by:
        return []
    text = f"marks '{state.sorted_by}' sort these tests, so tests of one load are not moved together"
    return [f"llmload: {text}; a load that others interrupt is loaded again"]


def lines(config: pytest.Config) -> list[str]:
    """Return the lines that say what this run loads, and which of our options belong to a different plugin."""
    found = []
    if taken := options.taken(config):
        names = ", ".join(f"--llm-{name} is --llmload-{name}" for name in taken)
        found.append(f"llmload: another plugin or conftest owns some of our options: {names}")
    if taken := options.taken_ini(config):
        names = ", ".join(f"{options.ini_name(name)} is {options.flag(config, name)}" for name in taken)
        found.append(f"llmload: another plugin or conftest owns some of our ini settings: {names}")
    if options.given(config):
        from pytest_llmload.host.run.stash import state_of

        state = state_of(config)
        models = ", ".join(f"{model.name} ({model.spec})" for model in state.models)
        settings = state.settings
        mode = " · updating" if settings.update_baselines else " · recording what is missing" * settings.record_missing
        strict = " · strict" if settings.strict else ""
        inline = " · inline: nothing is gated or recorded" if settings.inline else ""
        predicted = f" · predicted for {settings.predict}: nothing is recorded" if settings.predict else ""
        where = settings.baselines
        if where.is_relative_to(config.rootpath):
            where = where.relative_to(config.rootpath)
        found.append(
            f"llmload: {models} · workload {settings.workload} · baselines {where}{mode}{strict}{inline}{predicted}"
        )
    return found
