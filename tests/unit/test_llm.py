"""What a test sees of a load: frozen, and a figure that is not there says why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sample_loads import METRICS, load

from pytest_llmload.host.loads.llm import LLM


@pytest.fixture
def result():
    return load(unavailable={"gpu.process": "no driver"}, metrics={"gpu.process": None})


@pytest.fixture
def llm(result):
    return LLM(SimpleNamespace(result=result, with_times=lambda: result))


def test_no_test_changes_what_the_next_one_sees(llm, result):
    before = result.to_json()
    llm.numbers.logits[:] = []
    llm.result.metrics["gpu.weights"] = 0
    llm.result.notes.append("mine")
    llm.manifest.clear()
    with pytest.raises(TypeError):
        llm.metrics["gpu.weights"] = 0
    with pytest.raises(TypeError):
        llm.environment["torch"] = "mine"
    with pytest.raises(AttributeError):
        llm.timing.samples["ttft"].clear()
    assert result.to_json() == before


def test_figures_are_found_by_name(llm):
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
def test_a_figure_that_is_not_there_says_why(llm, name, message):
    with pytest.raises(KeyError) as error:
        llm.metrics[name]
    assert error.value.args == (message,)


def test_an_attribute_says_the_same(llm):
    with pytest.raises(AttributeError, match=r"did you mean gpu\.settled\?"):
        _ = llm.memory.gpu.setled
