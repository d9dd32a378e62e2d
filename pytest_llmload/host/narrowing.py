"""Whether a run left tests out, so that baselines without a test prove nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

#: What a test file that could own a baseline has to mention.
_OWNS = ("memory_baseline", "latency_baseline", "pytest_llmload.suite")


def narrowed(config: pytest.Config) -> bool:
    """Whether tests were deselected, or test files outside this run's arguments could own baselines."""
    option = config.option
    if option.keyword or option.markexpr or option.deselect or any("::" in str(arg) for arg in config.args):
        return True
    if any(getattr(option, name, None) for name in ("lf", "last_failed", "stepwise", "maxfail", "llmload_strategy")):
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
            if any(path.match(pattern) for pattern in patterns):
                text = path.read_text(errors="replace")
                if any(word in text for word in _OWNS):
                    yield path.resolve()
