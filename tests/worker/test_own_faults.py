"""A check or a probe of ours that raises is our fault: it is named, and the load keeps its verdict and figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from loads import quick

from pytest_llmload.core.results import LOADED, NOT_APPLIED, Problem
from pytest_llmload.strategies.lora import Lora
from pytest_llmload.worker import checks


def _raises(loaded: Any) -> Iterator[Any]:
    """Raise in the middle of a check."""
    yield from ()
    raise ZeroDivisionError("integer modulo by zero")


def test_a_check_that_raises_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "AFTER_LOAD", (_raises, *checks.AFTER_LOAD))
    result = quick("tiny-llama", quant="nf4")
    assert result.outcome == LOADED, result.problems
    assert [fault.who for fault in result.faults] == ["check 'test_own_faults._raises' of pytest-llmload"]
    assert "ZeroDivisionError: integer modulo by zero" in result.faults[0].message
    assert "test_own_faults.py" in result.faults[0].message
    assert {"host.weights", "host.settled"} <= result.metrics.keys()
    assert result.manifest
    assert result.numbers.logits


def test_what_a_check_found_before_it_raised_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def found_then_raises(loaded: Any) -> Iterator[Any]:
        yield Problem("values", "one tensor differs")
        raise KeyError("lost")

    monkeypatch.setattr(checks, "AFTER_FORWARD", (found_then_raises,))
    result = quick("tiny-llama")
    assert result.outcome == NOT_APPLIED
    assert [problem.message for problem in result.problems] == ["one tensor differs"]
    assert "KeyError" in result.faults[0].message


def test_a_probe_that_raises_leaves_the_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llmload.probes.manifest.Inventory", None)
    result = quick("tiny-llama")
    assert result.outcome == LOADED
    assert [fault.who for fault in result.faults] == ["probe 'Manifest'"]
    assert not result.manifest
    assert "host.weights" in result.metrics


@pytest.mark.parametrize(
    ("file", "own"), [("bitsandbytes/functional.py", False), ("pytest_llmload/worker/checks/adapter.py", True)]
)
def test_a_check_that_runs_the_model_again(monkeypatch: pytest.MonkeyPatch, file: str, own: bool) -> None:
    """Tell the model's own exception from one of the code that runs it."""
    code = compile("raise RuntimeError('no kernel')", f"/env/site-packages/{file}", "exec")

    def exercised(self: Lora, job: Any, loaded: Any) -> Iterator[Any]:
        yield from ()
        exec(code)

    monkeypatch.setattr(Lora, "exercised", exercised)
    result = quick("tiny-llama", adapter="random")
    assert [fault.who for fault in result.faults] == (["check 'lora' of pytest-llmload"] if own else [])
    assert [problem.check for problem in result.problems] == ([] if own else ["forward"])
