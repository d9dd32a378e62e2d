"""The command that records or accepts what one test loads."""

from __future__ import annotations

import os
import shlex

import pytest

from pytest_llmload.host.run.suite import SUITE
from pytest_llmload.host.settings import options

#: Options that the command does not repeat. What is predicted is recorded on the device itself.
_WITHOUT: tuple[str, ...] = ("update-baselines", "record-missing", "strict", "report", "predict", "against")


def accept_command(item: pytest.Item, model: str | None) -> str:
    """Return the command, as typed in the directory where this run was started.

    It selects the one test and the one model, keeps this run's own options, and adds the update flag. ``model`` is the
    model as an option of this run names it, or None.
    """
    config = item.config
    _, separator, name = item.nodeid.partition("::")
    if item.path.parent == SUITE:
        test = ["--pyargs", f"pytest_llmload.suite.{item.path.stem}{separator}{name}"]
    else:
        test = [f"{os.path.relpath(item.path, config.invocation_params.dir)}{separator}{name}"]
    without = _WITHOUT
    chosen = []
    # Models of the ini file stay where they are.
    if model is not None and config.getoption(options.dest("model")):
        without = (*_WITHOUT, "model")
        chosen = [f"{options.flag(config, 'model')}={model}"]
    kept = options.given_arguments(config, without=without)
    return shlex.join(["pytest", *test, *chosen, *kept, options.flag(config, "update-baselines")])
