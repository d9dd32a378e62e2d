"""What a worker hands over, what the suite loads, and which baselines are stale: without a test run around them."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sample_loads import NF4, load

from pytest_llmload.core.job import Device
from pytest_llmload.core.runs import Run
from pytest_llmload.core.verdicts import ERROR, FAIL, PASS, SKIP
from pytest_llmload.host.hooks.suite_loads import suite_loads
from pytest_llmload.host.run import partial_runs, stale
from pytest_llmload.host.run.log import RunLog, note
from pytest_llmload.strategies.builtin import BUILTIN

INT8 = dataclasses.replace(NF4, quant="int8", double_quant=False)


def _worker(outcome: str, nodeid: str, **fields: Any) -> RunLog:
    run = Run(NF4, "cpu-x86_64", load())
    note(run, nodeid, outcome)
    log = pickle.loads(pickle.dumps(RunLog(runs={NF4: run}, **fields)))
    assert isinstance(log, RunLog)
    return log


def test_the_controller_knows_what_any_worker_knows() -> None:
    log = RunLog()
    log.merge(_worker(PASS, "a", mistakes=["x"], used_baselines={Path("1")}, collected=True, has_load_tests=True))
    log.merge(_worker(FAIL, "b", used_baselines={Path("2")}, left_out={"served": "no"}, cold_reason="threads"))
    log.merge(RunLog(runs={INT8: Run(INT8, "cpu-x86_64")}, tests_left_out=True, suite_collected=True))
    assert (log.runs[NF4].outcome, log.runs[NF4].nodeids, list(log.runs)) == (FAIL, ["a", "b"], [NF4, INT8])
    assert (log.mistakes, log.used_baselines) == (["x"], {Path("1"), Path("2")})
    assert (log.collected, log.has_load_tests, log.tests_left_out, log.suite_collected) == (True,) * 4
    assert (log.left_out, log.cold_reason) == ({"served": "no"}, "threads")


@pytest.mark.parametrize(
    ("outcomes", "worst"), [([SKIP, PASS], PASS), ([PASS, SKIP], PASS), ([FAIL, ERROR], ERROR), ([ERROR, PASS], ERROR)]
)
def test_the_worst_outcome_of_a_loads_tests_counts(outcomes: list[str], worst: str) -> None:
    run = Run(NF4, "cpu-x86_64")
    for number, outcome in enumerate(outcomes):
        note(run, f"test_{number}", outcome, "why" if outcome == ERROR else "")
    assert (run.outcome, run.messages) == (worst, ["why"] * (ERROR in outcomes))


def _state(**settings: Any) -> Any:
    config = SimpleNamespace(stash={})
    given = SimpleNamespace(**{"strategies": [], "endpoint": None, "loader": None, **settings})
    return SimpleNamespace(config=config, settings=given, strategies=BUILTIN, device=Device("cpu", "cpu-x86_64"))


def test_the_suite_loads_what_fits_the_device_and_says_what_not() -> None:
    loads = suite_loads(_state())
    assert {"quant": "nf4", "double_quant": True} in loads.fields
    assert loads.left_out["loader"] == "only with --llm-loader"
    assert loads.left_out["tp_plan"] == "on a CPU run only if --llm-strategy=tp_plan requests it"
    assert {"strategy": "loader", "target": "a:b"} in suite_loads(_state(loader="a:b")).fields
    assert {"strategy": "served"} in suite_loads(_state(endpoint="http://h")).fields
    assert suite_loads(_state(strategies=["tp_plan"])).fields[0]["strategy"] == "tp_plan"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["loader"], "strategy 'loader' needs --llm-loader"),
        (["nf5"], "--llm-strategy: unknown 'nf5'; use one of single"),
    ],
)
def test_a_strategy_that_the_suite_cannot_load_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        suite_loads(_state(strategies=names))


def test_a_baseline_is_stale_if_a_whole_run_of_its_model_and_device_did_not_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = {
        "used": ("m", "cpu"),
        "stale": ("m", "cpu"),
        "other model": ("n", "cpu"),
        "two GPUs": ("m", "cpu-x2"),
        "suite": ("m", "cpu"),
        "left out": ("m", "cpu"),
        "unreadable": ("m", "cpu"),
        "endpoint": ("m", "endpoint"),
    }
    contents = {
        "stale": SimpleNamespace(spec={"quant": "nf4"}, suite=False),
        "suite": SimpleNamespace(spec={}, suite=True),
        "left out": SimpleNamespace(spec={"strategy": "served"}, suite=False),
        "endpoint": SimpleNamespace(spec={}, suite=False),
    }
    entries = [SimpleNamespace(path=Path(name), model=model, device=device) for name, (model, device) in paths.items()]
    state = SimpleNamespace(
        log=RunLog(collected=True, used_baselines={Path("used")}, left_out={"served": "no"}),
        models=[SimpleNamespace(name="m")],
        store=SimpleNamespace(entries=lambda: entries, read=lambda path: contents.get(str(path))),
        device=Device("cpu", "cpu"),
        settings=SimpleNamespace(endpoint=None, predict=None),
        config=None,
    )
    monkeypatch.setattr(partial_runs, "narrowed", lambda config: False)
    assert stale.stale_baselines(state) == [Path("stale"), Path("unreadable")]  # type: ignore[arg-type]
    state.log.suite_collected, state.settings.endpoint = True, "http://h"
    found = stale.stale_baselines(state)  # type: ignore[arg-type]
    assert set(map(str, found)) == {"stale", "unreadable", "suite", "endpoint"}
    state.log.tests_left_out = True
    assert stale.stale_baselines(state) == []  # type: ignore[arg-type]
