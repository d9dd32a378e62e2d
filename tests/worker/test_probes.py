"""Parts of probes: patterns of modules, places in a vocabulary, controls around a load."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from loads import job, load

from pytest_llmload.core.job import LOAD_TIME, MEMORY, TIMING
from pytest_llmload.probes.builtin import probes_for
from pytest_llmload.probes.growth import CALLS, NOISE, Growth
from pytest_llmload.probes.load_control import LoadControl
from pytest_llmload.probes.manifest import starred
from pytest_llmload.probes.numbers import spread
from pytest_llmload.process.measurement import new_result


@pytest.mark.parametrize(
    ("path", "pattern", "number"),
    [
        ("model.layers.7.mlp.up_proj", "model.layers.*.mlp.up_proj", 7),
        ("model.layers.12.experts.3.w1", "model.layers.*.experts.3.w1", 12),
        ("0", "*", 0),
        ("lm_head", "lm_head", None),
        ("conv1.weight2", "conv1.weight2", None),
    ],
)
def test_alike_modules_share_a_pattern(path: str, pattern: str, number: int | None) -> None:
    assert starred(path) == (pattern, number)


def test_spread_takes_both_ends() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(100, 3) == [0, 49, 99]
    assert len(set(spread(9, 8))) == 8


def test_a_load_that_is_judged_has_its_ratio_to_a_control_around_it() -> None:
    result = load("tiny-llama", figures=(LOAD_TIME,), checks=False)[0]
    (before, after), (ratio,) = result.samples["load.control"], result.samples["load.relative"]
    assert ratio == pytest.approx(result.metrics["load"] / ((before + after) / 2))
    assert LoadControl not in probes_for((MEMORY, TIMING)), "its memory would be in the figures"


def repeated(figure: str, left: list[int], monkeypatch: pytest.MonkeyPatch) -> Growth:
    """Return the probe after calls that leave so many bytes each."""
    found = Growth(job("tiny-llama"))
    held = accumulate(left, initial=1 << 20)
    monkeypatch.setattr(found, "_held", lambda: {figure: next(held)})
    monkeypatch.setattr(found, "_call", lambda loaded: None)
    unused: Any = None
    found.finished(unused)
    return found


@pytest.mark.parametrize(
    ("figure", "left"),
    [
        ("host.growth", [-64]),
        ("host.growth", [NOISE["host.growth"]]),
        ("host.growth", [NOISE["host.growth"] + 1, 0]),
        ("host.growth", [64 << 10] * CALLS),
        ("gpu.growth", [64, 0]),
        ("gpu.growth", [64] * CALLS),
    ],
)
def test_a_call_is_repeated_until_one_leaves_nothing_but_noise(
    figure: str, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert repeated(figure, left, monkeypatch).left == {figure: left}


@pytest.mark.parametrize(
    ("left", "growth"),
    [([-64], 0), ([NOISE["host.growth"]], 0), ([9 << 10, 12 << 10, 10 << 10], 9 << 10), ([64 << 10, 4096], 0)],
)
def test_noise_is_no_growth(left: list[int], growth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = repeated("host.growth", left, monkeypatch)
    result = new_result(found.job)
    found.fill(result)
    assert result.metrics["host.growth"] == growth


def test_a_rank_repeats_a_call_as_long_as_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute together: one that stopped would have the other wait for ever."""
    monkeypatch.setattr("pytest_llmload.probes.growth.agreed", lambda job, wish: False)
    assert repeated("host.growth", [0] * CALLS, monkeypatch).left == {"host.growth": [0] * CALLS}
