"""The names that options and checks take, and what each of them may be given."""

from __future__ import annotations

import pytest

from pytest_llmload.core.metrics import section_of, tolerance_of
from pytest_llmload.core.units import Tolerance


@pytest.mark.parametrize(
    ("name", "given", "tolerance"),
    [
        ("gpu.settled", "1%|8MiB", Tolerance(0.01, 8 << 20)),
        ("gpu.0.settled", "8MiB", Tolerance(absolute=8 << 20)),
        ("gpu.load_allocations", "3", Tolerance(absolute=3)),
        ("gpu.weights", "0", Tolerance()),
        ("load", "500ms", Tolerance(absolute=0.5)),
        ("numbers", "0.1", Tolerance(absolute=0.1)),
        ("numbers", "10%", Tolerance(relative=0.1)),
        ("load", Tolerance(relative=0.2), Tolerance(relative=0.2)),
    ],
)
def test_a_tolerance_is_read_in_the_unit_of_its_metric(name, given, tolerance):
    assert tolerance_of(name, given) == tolerance


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("load", "8MiB", ValueError, "load: '8MiB' is not a tolerance here: write '1%', '5ms'"),
        ("gpu.settled", "5ms", ValueError, "gpu.settled: '5ms' is not a tolerance here: write '1%', '8MiB'"),
        ("gpu.settled", "1%|50%", ValueError, "gpu.settled: '1%|50%' is not a tolerance here"),
        ("load", "0%", ValueError, "load: no two times are equal: its tolerance has to be more than 0"),
        ("ttft", Tolerance(), ValueError, "ttft: no two times are equal"),
        ("manifest", "1%", ValueError, "manifest: modules are compared exactly"),
        ("gpu.setled", "1%", KeyError, "unknown metric 'gpu.setled'; known: gpu.weights"),
    ],
)
def test_what_means_nothing_is_one_sentence(name, given, error, message):
    with pytest.raises(error) as caught:
        tolerance_of(name, given)
    assert caught.value.args[0].startswith(message)


def test_every_name_has_a_section():
    assert [section_of(name) for name in ("gpu.1.settled", "manifest", "numbers", "token.ops", "load")] == [
        *["memory"] * 3,
        "work",
        "time",
    ]
