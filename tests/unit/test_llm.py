"""What a test sees of a load: frozen, and a figure that is not there says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sample_loads import METRICS, load

from pytest_llmload.core.results import LoadResult
from pytest_llmload.host.loads.llm import LLM


@pytest.fixture
def result() -> LoadResult:
    return load(unavailable={"gpu.process": "no driver"}, metrics={"gpu.process": None})


@pytest.fixture
def llm(result: LoadResult) -> LLM:
    return LLM(SimpleNamespace(result=result, with_times=lambda: result))  # type: ignore[arg-type]


def test_no_test_changes_what_the_next_one_sees(llm: LLM, result: LoadResult) -> None:
    before = result.to_json()
    llm.numbers.logits[:] = []
    llm.result.metrics["gpu.weights"] = 0
    llm.result.notes.append("mine")
    llm.manifest.clear()
    with pytest.raises(TypeError):
        llm.metrics["gpu.weights"] = 0  # type: ignore[index]
    with pytest.raises(TypeError):
        llm.environment["torch"] = "mine"  # type: ignore[index]
    with pytest.raises(AttributeError):
        llm.timing.samples["ttft"].clear()  # type: ignore[attr-defined]
    assert result.to_json() == before


def test_figures_are_found_by_name(llm: LLM) -> None:
    assert llm.metrics["gpu.settled"] == llm.memory.gpu.settled == METRICS["gpu.settled"]
    assert len(llm.metrics) == len(METRICS) - 1
    assert llm.metrics.get("nothing.like.it", 7) == 7
    assert "gpu.process" not in llm.metrics


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu.setled", "gpu.setled was not measured: this load has no such figure; did you mean gpu.settled?"),
        ("gpu.process", "gpu.process was not measured: no driver"),
        ("xyz", "xyz was not measured: this load has no such figure"),
    ],
)
def test_a_figure_that_is_not_there_says_why(llm: LLM, name: str, message: str) -> None:
    with pytest.raises(KeyError) as error:
        llm.metrics[name]
    assert error.value.args == (message,)


def test_an_attribute_says_the_same(llm: LLM) -> None:
    with pytest.raises(AttributeError, match=r"did you mean gpu\.settled\?"):
        _ = llm.memory.gpu.setled
