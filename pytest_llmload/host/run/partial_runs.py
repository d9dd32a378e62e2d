"""Detect runs that leave tests out, in which a baseline without a test may still be in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_llmload.core.spec import Workload
from pytest_llmload.host.settings import options

#: Options of pytest, and of this plugin, under which tests are left out or load something else than they usually do.
_NARROWING = (
    *("keyword", "markexpr", "deselect", "ignore", "ignore_glob"),
    *("lf", "last_failed", "stepwise", "maxfail"),
    *("llmload_strategy", "llmload_loader", "llmload_adapter", "llmload_endpoint"),
)
#: The texts of which a test file must mention one to own a baseline.
_OWNS = ("memory_baseline", "latency_baseline", "pytest_llmload.suite")


def narrowed(config: pytest.Config) -> bool:
    """Return whether the run selects less than all tests, or test files outside its arguments could own baselines."""
    if any(getattr(config.option, name, None) for name in _NARROWING) or any("::" in str(arg) for arg in config.args):
        return True
    # A test's own workload is named in its baseline's file only where it is not the run's.
    workload = config.getoption(options.dest("workload"))
    usual = config.getini(options.ini_name("workload")) or options.OPTIONS["workload"][1]
    if workload is not None and str(Workload.parse(workload)) != usual:
        return True
    given = [Path(config.invocation_params.dir, arg).resolve() for arg in config.args]
    if config.rootpath in given:
        return False
    return any(not any(file.is_relative_to(place) for place in given) for file in _owners(config))


def _owners(config: pytest.Config) -> Iterator[Path]:
    patterns = config.getini("python_files")
    ignored = config.getini("norecursedirs")
    for folder, folders, files in os.walk(config.rootpath):
        folders[:] = [
            name
            for name in folders
            if not any(Path(name).match(pattern) for pattern in ignored)
            and not Path(folder, name, "pyvenv.cfg").exists()
        ]
        for name in files:
            path = Path(folder, name)
            # An editor's lock file is a link to nowhere.
            if any(path.match(pattern) for pattern in patterns) and path.is_file() and _may_own(path):
                yield path.resolve()


def _may_own(path: Path) -> bool:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return True  # a file that cannot be read may own a baseline
    return any(word in text for word in _OWNS)
