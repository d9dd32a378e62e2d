"""A method of one's own: what is planned is what is loaded, and a wrong value is seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import loads
import pytest

from pytest_llmload.core.job import MEMORY, Job
from pytest_llmload.process.job_strategies import plan
from pytest_llmload.process.measurement import measure
from pytest_llmload.quantisation import registry


@pytest.fixture
def rows() -> Iterator[Job]:
    """A job that asks for the scheme of ``rows_method.py``."""
    job = loads.job("tiny-llama", quant="rows-int8", figures=(MEMORY,))
    registry.use(("rows_method:Rows",))
    yield dataclasses.replace(job, methods=("rows_method:Rows",))
    registry.use(())


def test_what_is_planned_is_what_is_loaded(rows: Job) -> None:
    result, _ = measure(rows, lambda phase: None)
    assert result.problems == []
    assert plan(rows)["weights.logical"] == result.metrics["weights.logical"]


def test_rows_may_be_dequantised_as_a_matrix(rows: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import rows_method

    flat = rows_method.StoredRows.dequantised
    monkeypatch.setattr(
        rows_method.StoredRows,
        "dequantised",
        lambda self, start, stop: flat(self, start, stop).reshape(-1, self.shape[-1]),
    )
    result, _ = measure(rows, lambda phase: None)
    assert result.problems == []
    assert result.faults == []


def test_values_that_are_not_the_checkpoints_are_seen(rows: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import rows_method

    rounded = rows_method.StoredRows.dequantised
    monkeypatch.setattr(
        rows_method.StoredRows, "dequantised", lambda self, start, stop: rounded(self, start, stop) * 0.9
    )
    result, _ = measure(rows, lambda phase: None)
    (problem,) = result.problems
    assert "a dequantised block of 21 of 21 weights is not the checkpoint's" in problem.message
